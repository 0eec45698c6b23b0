"""Whose each response of the Responses API is: its id is the client's to choose, and opens a conversation."""

from collections import OrderedDict
from typing import Final

from deltamux.serve.api.tenants import Tenant

MAX_KNOWN: Final = 65_536


class Owners:
    """Tenants by response id, of the last ones."""

    def __init__(self) -> None:
        self._names: OrderedDict[str, str] = OrderedDict()

    def note(self, response_id: str, tenant: Tenant | None) -> None:
        """A tenant makes a response."""
        if tenant is None:
            return
        self._names[response_id] = tenant.name
        self._names.move_to_end(response_id)
        if len(self._names) > MAX_KNOWN:
            self._names.popitem(last=False)

    def may_read(self, response_id: str, tenant: Tenant | None) -> bool:
        """Whether a tenant may read, cancel or go on with a response; one of unknown origin is nobody's."""
        return tenant is None or tenant.admin or self._names.get(response_id) == tenant.name

    def is_of_another(self, response_id: str, tenant: Tenant | None) -> bool:
        """Whether the id is taken, by another tenant's response."""
        name = self._names.get(response_id)
        return tenant is not None and name is not None and name != tenant.name
