// Dialogs of the page of keys. A secret is in this page only while its dialog is open.
"use strict";
(() => {
  const dialog = (name) => document.getElementById(name);
  const secret = dialog("secret");
  const text = dialog("secret-text");
  const told = dialog("secret-told");
  let isFirst = false;
  let isMine = false;
  let isCopied = false;

  function fill(place, name, flags) {
    for (const one of place.querySelectorAll("[data-key-name]")) one.textContent = name;
    for (const [selector, isShown] of Object.entries(flags)) {
      for (const one of place.querySelectorAll(selector)) one.hidden = !isShown;
    }
  }

  // One dialog serves all keys: its form gets the address of the key.
  document.addEventListener("click", ({ target }) => {
    const button = target.closest?.("[data-key-dialog]");
    if (!button) return;
    const { keyDialog: what, name } = button.dataset;
    const place = dialog(`${what}-key`);
    const form = place.querySelector("form");
    const address = `/api/v1/keys/${encodeURIComponent(name)}`;
    form.reset();
    for (const problem of form.querySelectorAll(".problem")) problem.textContent = "";
    form.setAttribute(what === "rotate" ? "hx-post" : "hx-delete", what === "rotate" ? `${address}/rotate` : address);
    fill(place, name, { "[data-if-mine]": "mine" in button.dataset, "[data-if-last]": "last" in button.dataset });
    place.dataset.mine = String("mine" in button.dataset);
    place.showModal();
  });

  document.addEventListener("api:done", ({ target, detail: { answer } }) => {
    if (target.matches("[data-makes-secret]") && answer?.secret) {
      const { name, secret: made } = answer;
      isFirst = target.hasAttribute("data-first");
      isMine = target.closest("dialog").dataset.mine === "true";
      target.reset();
      // The dialog of the form closes after this event, and gives the focus back: the next one opens then.
      setTimeout(() => show(name, made));
    } else if (target.matches("#revoke-key form")) {
      // This session has ended with its key.
      if (dialog("revoke-key").dataset.mine === "true") location.assign("/sign-in?next=/ui/keys");
      else window.page.refresh();
    }
  });

  function show(name, made) {
    isCopied = false;
    fill(secret, name, { "[data-if-first]": isFirst });
    text.textContent = made;
    told.textContent = "";
    secret.showModal();
    dialog("secret-copy").focus();
  }

  function forget() {
    text.textContent = "";
    told.textContent = "";
    getSelection()?.removeAllRanges();
  }

  // Outside of HTTPS and of this machine there is no clipboard for scripts but the old command.
  async function copy() {
    getSelection().selectAllChildren(text);
    try {
      await navigator.clipboard.writeText(text.textContent);
      isCopied = true;
    } catch {
      isCopied = document.execCommand("copy");
    }
    told.textContent = isCopied ? secret.dataset.copied : secret.dataset.copyFailed;
  }

  dialog("secret-copy").addEventListener("click", copy);

  dialog("secret-sign-in").addEventListener("click", async () => {
    try {
      const body = new URLSearchParams({ key: text.textContent, next: "/ui/keys" });
      const answer = await fetch("/sign-in", { method: "POST", body });
      if (!answer.ok) throw new Error(String(answer.status));
      isFirst = false;
      forget();
      location.assign("/ui/keys");
    } catch {
      told.textContent = secret.dataset.signInFailed;
    }
  });

  // One press of Escape does not lose what nobody can show again.
  secret.addEventListener("cancel", (event) => {
    if (isCopied) return;
    event.preventDefault();
    isCopied = true;
    told.textContent = secret.dataset.notCopied;
  });

  secret.addEventListener("close", () => {
    forget();
    // From the first key on this page needs one too.
    if (isFirst) location.assign("/sign-in?next=/ui/keys");
    // The secret that this browser is signed in with may have ended.
    else if (isMine) location.assign("/ui/keys");
    else window.page.refresh();
  });
  addEventListener("pagehide", forget);
})();
