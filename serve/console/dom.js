// Elements. Whatever comes from a server is set as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";

// An element: properties that begin with "on" are listeners, the rest are attributes. Children are nodes or text.
export function el(tag, properties = {}, ...children) {
  return filled(document.createElement(tag), properties, children);
}

export function svg(tag, properties = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), properties, children);
}

function filled(node, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else set(node, name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

// Sets an attribute where it differs; null, undefined and false take it away.
export function set(node, name, value) {
  const wanted = value === true ? "" : value;
  if (wanted === null || wanted === undefined || wanted === false) {
    if (node.hasAttribute(name)) node.removeAttribute(name);
  } else if (node.getAttribute(name) !== String(wanted)) {
    node.setAttribute(name, wanted);
  }
}

// Sets an element's text where it differs, so that what is selected or read aloud is left alone.
export function text(node, words) {
  const wanted = String(words);
  if (node.textContent !== wanted) node.textContent = wanted;
}

// Disables a button without taking the focus from it.
export function enable(button, enabled) {
  set(button, "aria-disabled", enabled ? null : "true");
}

export function isEnabled(button) {
  return button.getAttribute("aria-disabled") !== "true";
}

// Keeps a parent's children in step with a list: `make(item)` once for each key, `update(child, item)` always.
export function keyed(parent, items, keyOf, make, update) {
  const known = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  let place = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    const child = known.get(key) ?? make(item);
    known.delete(key);
    child.dataset.key = key;
    update(child, item);
    // A child that stands where it belongs is not moved: moving it would take the focus.
    if (child === place) place = place.nextElementSibling;
    else parent.insertBefore(child, place);
  }
  for (const gone of known.values()) gone.remove();
}

export function fill(parent, ...children) {
  parent.replaceChildren(...children.filter((child) => child !== null));
}

// The heading of a view, with a sentence for those who see it for the first time.
export function heading(title, lead) {
  return el("div", { class: "heading" }, el("h1", { tabindex: "-1" }, title), el("p", {}, lead));
}

// What an object of a server's answer holds itself under a name, which can be any.
export function own(object, name) {
  return object && Object.hasOwn(object, name) ? object[name] : undefined;
}

let fields = 0;

export function field(label, control) {
  control.id = `field-${(fields += 1)}`;
  return el("div", { class: "field" }, el("label", { for: control.id }, label), control);
}
