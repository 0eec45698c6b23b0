#!/usr/bin/env bash
# Build the CPU image, start everything with the demo's experts, ask a question, check that Prometheus
# scrapes it and that Grafana has the dashboard; then take it down. Needs Docker with Compose 2.24 or newer.
set -euo pipefail
cd "$(dirname "$0")"

export COMPOSE_PROJECT_NAME=deltamux-confirm COMPOSE_PROFILES=cpu
export DELTAMUX_PORT=${DELTAMUX_PORT:-18000} GRAFANA_PORT=${GRAFANA_PORT:-13000}
secrets=$(mktemp -d)
chmod 755 "$secrets"
export DELTAMUX_API_KEY_FILE=$secrets/api_key GRAFANA_PASSWORD_FILE=$secrets/grafana_password
echo confirm-key > "$DELTAMUX_API_KEY_FILE"
echo confirm-password > "$GRAFANA_PASSWORD_FILE"
trap 'docker compose down --volumes --timeout 90; rm -r "$secrets"' EXIT

docker compose config --quiet
docker compose build
# The demo's experts are fine-tuned first: about 20 minutes on two cores.
docker compose up --detach --wait --wait-timeout 5400

answer=$(curl --fail --silent --show-error "http://127.0.0.1:$DELTAMUX_PORT/v1/chat/completions" \
  --header "Authorization: Bearer confirm-key" --header "Content-Type: application/json" \
  --data '{"model": "auto", "max_tokens": 16, "messages": [{"role": "user", "content": "How many customers ordered twice?"}]}')
grep --quiet '"finish_reason"' <<< "$answer"
docker compose exec -T prometheus promtool check config /etc/prometheus/prometheus.yml
sleep 45
docker compose exec -T prometheus promtool query instant http://127.0.0.1:9090 'up{job="deltamux"} == 1' | grep --quiet deltamux
curl --fail --silent --user admin:confirm-password "http://127.0.0.1:$GRAFANA_PORT/api/dashboards/uid/deltamux" | grep --quiet '"title":"deltamux"'
test "$(docker compose exec -T server-cpu id -u)" = 10001
echo "confirmed: $answer"
