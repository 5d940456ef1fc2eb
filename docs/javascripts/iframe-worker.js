/* A browser starts no worker from a file on the disk. There the search runs in a hidden frame in its place.
   Defines what the theme's bundle uses of a worker: postMessage, and events "message". */
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(address) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      const empty = new Promise((loaded) => frame.addEventListener("load", loaded, { once: true }));
      this.inside = empty.then(() => this.start(frame.contentWindow, address));
      document.body.append(frame);
    }

    /* Load the worker's script into the frame; its messages become events of this object. */
    async start(inside, address) {
      const load = (source) =>
        new Promise((done, failed) => {
          const script = inside.document.createElement("script");
          script.src = source;
          script.onload = done;
          script.onerror = () => failed(new Error(source + " could not be read"));
          inside.document.head.append(script);
        });
      inside.importScripts = async (...sources) => {
        for (const source of sources) await load(new URL(source, address));
      };
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      await load(address);
      return inside;
    }

    postMessage(data) {
      this.inside.then((inside) => inside.dispatchEvent(new MessageEvent("message", { data })));
    }
  };
  window.Worker = window.IFrameWorker;
}
