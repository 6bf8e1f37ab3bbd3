// The page of sf_jax.serve: one WebSocket a video, H.264 fragments into Media Source Extensions, JPEGs where those fail.
const $ = (id) => document.getElementById(id);
const KEPT_SECONDS = 60;
const RETRY_MS = 1500;
const BUFFER_SECONDS = 0.5, MAX_BUFFER_SECONDS = 10; // of video that wait to be shown, at least and at most
const REPORT_MS = 125;
const PING_MS = 5000, SILENCE_MS = 20000; // between pings, and until an unanswered one means that the connection is lost
const LOST = 1006, RESTART = 1012; // close codes: without a word, and of a server that goes away
const TRIES = 60, TRY_SECONDS = 5; // tries to reach such a server again, and the time between them

let info = null; // what the server makes
let session = null; // the video that plays
let retry = null; // timer of the next try

class Session {
  constructor(prompt, seed, format, tries) {
    Object.assign(this, { prompt, seed, format, tries, paused: false, over: false, sent: new Map(), kept: [], metadata: null });
    const url = new URL("v1/realtime/video", location.href);
    url.protocol = url.protocol.replace("http", "ws");
    url.search = url.hash = "";
    this.socket = new WebSocket(url);
    this.socket.binaryType = "arraybuffer";
    this.buffer = Math.min(MAX_BUFFER_SECONDS, Math.max(BUFFER_SECONDS, (2 * info.chunk_frames) / info.fps));
    this.socket.onopen = () => this.send({
      type: "session.start", prompt, format, streaming_buffer_seconds: this.buffer, ...(seed === null ? {} : { seed }),
    });
    this.timer = setInterval(() => this.report(), REPORT_MS);
    this.socket.onmessage = ({ data }) => {
      this.heard = Date.now();
      return typeof data === "string" ? this.control(JSON.parse(data)) : this.media(data);
    };
    this.socket.onclose = ({ code }) => this.closed(code);
  }

  send(message) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
  }

  // Where the viewer is: chunks are made that much ahead of it.
  report() {
    this.ping(Date.now());
    const position = this.player?.position() ?? 0;
    if (this.over || position <= (this.reported ?? 0)) return;
    this.reported = position;
    this.send({ type: "session.playback", position_seconds: position });
  }

  // A connection that dies without a word, as when a laptop sleeps, is noticed here alone.
  ping(now) {
    if (this.over || !this.heard) return; // the first message must be session.start
    const answered = !this.pinged || this.heard >= this.pinged;
    if (!answered && now - this.pinged > SILENCE_MS) {
      this.socket.onclose = null;
      this.socket.close();
      this.closed(LOST);
    } else if (answered && now - (this.pinged ?? 0) >= PING_MS) {
      this.pinged = now;
      this.send({ type: "session.ping" });
    }
  }

  interact(prompt, options) {
    const event_id = `prompt-${this.sent.size + 1}`;
    this.sent.set(event_id, prompt);
    this.send({ type: "session.interaction", interaction: { event_id, event: { prompt }, ...options } });
  }

  control(message) {
    switch (message.type) {
      case "session.queued":
        say(`All streams are taken: you are number ${message.position} in line.`);
        break;
      case "video.start":
        this.config = message.config;
        $("seed").placeholder = `random (now ${message.config.seed})`;
        this.player = this.format === "m4s" ? new Mse(message.config.mime_type, this) : new Jpegs(message.config);
        remember(this.prompt, 0);
        this.started = true;
        fail("");
        buttons(true);
        say("Playing.");
        break;
      case "video.chunk_metadata":
        this.metadata = message;
        this.error = null;
        show(message, this.config);
        for (const id of message.started_event_ids) {
          remember(this.sent.get(id) ?? id, message.generation_chunk_index);
          say(`New prompt from chunk ${message.generation_chunk_index} on.`);
        }
        break;
      case "session.interaction.queued":
        fail("");
        say("Received; it takes effect with the next chunk.");
        break;
      case "session.done":
        this.over = true;
        this.reason = message.reason;
        fail("");
        say({ completed: "The video is complete.", stopped: "Stopped.", lifetime: "The stream's time is over.",
          shutdown: "The server is going down; try again in a minute." }[message.reason] ?? "Ended.");
        break;
      case "error":
        this.retryAfter = message.retry_after;
        this.error = message.message;
        fail(message.message);
        break;
    }
  }

  media(bytes) {
    if (!this.player || !this.metadata) return;
    const { num_frames } = this.metadata;
    this.player.add(bytes, this.metadata);
    if (this.format === "m4s") {
      this.kept.push({ bytes, seconds: num_frames / this.config.fps });
      let seconds = this.kept.reduce((sum, part) => sum + part.seconds, 0);
      while (this.kept.length > 1 && seconds - this.kept[0].seconds >= KEPT_SECONDS) {
        const first = this.kept.shift();
        seconds -= first.seconds;
        this.head ??= header(first.bytes);
      }
      $("download").disabled = false;
    }
    curtain("");
    $("download").title = this.format === "m4s" ? "" : "JPEG frames cannot be saved";
  }

  closed(code) {
    clearInterval(this.timer);
    const ended = this.over && this.reason !== "shutdown";
    this.over = true;
    this.player?.end();
    if (session !== this) return;
    buttons(false);
    const away = code === RESTART || (code === LOST && !this.heard && this.tries > 0 && this.tries < TRIES);
    const wait = this.retryAfter ?? (away ? TRY_SECONDS : 0);
    if (!ended && !this.started && wait) {
      curtain(`${this.error ?? "The server is going away"}. This page tries again by itself.`);
      $("stop").disabled = false; // which stops trying
      retry = setTimeout(() => play(this.prompt, this.seed, this.format, this.tries + 1), 1000 * wait);
      return;
    }
    if (!ended && code !== 1000 && !this.error && !this.reason) fail("The connection is lost. Press Start to begin again.");
    curtain($("error").textContent || $("status").textContent || "Ended.");
  }

  pause(paused) {
    this.paused = paused;
    this.send({ type: paused ? "session.pause" : "session.resume" });
    this.player?.pause(paused);
    $("pause").textContent = paused ? "Resume" : "Pause";
    say(paused ? "Paused." : "Playing.");
  }

  stop() {
    clearTimeout(retry);
    if (this.socket.readyState === WebSocket.OPEN && !this.over) return this.send({ type: "session.stop" });
    this.leave(); // before the connection is there, or between two tries
    fail("");
    buttons(false);
    say("Stopped.");
    curtain("Stopped.");
  }

  leave() {
    this.over = true;
    clearInterval(this.timer);
    this.socket.onclose = null;
    this.socket.close(1000);
    this.player?.leave();
  }
}

// Moves the fragments of a part back in time, so that a saved file begins at 0. Returns the time that was the first.
function shifted(bytes, back) {
  const copy = bytes.slice(0);
  const view = new DataView(copy);
  for (let place = 0; place < copy.byteLength; place += view.getUint32(place)) {
    if (view.getUint32(place + 4) !== 0x6d6f6f66) continue; // moof
    for (let i = place + 8; i + 16 <= place + view.getUint32(place); i++) {
      if (view.getUint32(i) !== 0x74666474 || view.getUint8(i + 4) !== 1) continue; // tfdt with 64 bits
      back ??= view.getBigUint64(i + 8);
      view.setBigUint64(i + 8, view.getBigUint64(i + 8) - back);
      break;
    }
  }
  return [copy, back];
}

// The boxes before the first fragment: what every part of the video needs.
function header(bytes) {
  const view = new DataView(bytes);
  let place = 0;
  while (place < bytes.byteLength && view.getUint32(place + 4) !== 0x6d6f6f66) place += view.getUint32(place);
  return bytes.slice(0, place);
}

class Mse {
  constructor(mime, owner) {
    this.owner = owner;
    this.video = $("video");
    this.video.hidden = false;
    $("canvas").hidden = true;
    this.waiting = [];
    this.source = new MediaSource();
    this.url = URL.createObjectURL(this.source);
    this.video.src = this.url;
    this.source.addEventListener("sourceopen", () => {
      this.buffer = this.source.addSourceBuffer(mime);
      this.buffer.addEventListener("updateend", () => this.pump());
      this.pump();
    }, { once: true });
    this.video.onerror = () => {
      if (!owner.over && session === owner) begin("jpeg");
    };
  }

  add(bytes) {
    this.waiting.push(bytes);
    this.pump();
  }

  pump() {
    const { buffer, video } = this;
    if (!buffer || buffer.updating || this.source.readyState !== "open") return;
    if (this.waiting.length) {
      try {
        buffer.appendBuffer(this.waiting[0]);
        this.waiting.shift();
      } catch (error) {
        fail(`The browser cannot play the video (${error.name}).`);
      }
      return;
    }
    const ranges = buffer.buffered;
    if (!ranges.length) return;
    if (video.currentTime < ranges.start(0)) video.currentTime = ranges.start(0);
    if (video.paused && !this.owner.paused) video.play().catch(({ name }) => name === "NotAllowedError" && say("Press the video to play it."));
    if (video.currentTime - ranges.start(0) > 20) buffer.remove(0, video.currentTime - 10);
  }

  position() {
    return this.video.currentTime;
  }

  pause(paused) {
    if (paused) this.video.pause();
    else this.video.play().catch(() => {});
  }

  end() {
    if (this.source.readyState === "open" && this.buffer && !this.buffer.updating && !this.waiting.length) this.source.endOfStream();
  }

  leave() {
    URL.revokeObjectURL(this.url);
  }
}

class Jpegs {
  constructor(config) {
    this.config = config;
    this.frames = [];
    this.drawn = 0;
    this.canvas = $("canvas");
    this.canvas.hidden = false;
    $("video").hidden = true;
    [this.canvas.width, this.canvas.height] = [config.width, config.height];
    this.context = this.canvas.getContext("2d");
    this.timer = setInterval(() => this.draw(), 1000 / config.fps);
  }

  add(bytes, { frame_lengths }) {
    this.adding = (this.adding ?? Promise.resolve()).then(() => this.decode(bytes, frame_lengths)); // one after the other
  }

  async decode(bytes, lengths) {
    let place = 0;
    for (const length of lengths) {
      const blob = new Blob([bytes.slice(place, (place += length))], { type: "image/jpeg" });
      this.frames.push(await createImageBitmap(blob));
    }
  }

  position() {
    return this.drawn / this.config.fps;
  }

  draw() {
    if (this.stopped || !this.frames.length) return;
    const frame = this.frames.shift();
    this.context.drawImage(frame, 0, 0);
    this.drawn += 1;
    frame.close();
  }

  pause(paused) {
    this.stopped = paused;
  }

  end() {
    setTimeout(() => this.leave(), 2000); // what is there is still shown
  }

  leave() {
    clearInterval(this.timer);
  }
}

const say = (text) => { $("status").textContent = text; };
const fail = (text) => { $("error").textContent = text; };
const curtain = (text) => { $("curtain").textContent = text; };

function show(chunk, config) {
  $("size").textContent = `${config.width} × ${config.height}`;
  $("fps").textContent = `${config.fps} FPS`;
  $("time").textContent = `${Math.round(chunk.chunk_seconds * 1000)} ms`;
  $("ahead").textContent = chunk.chunks_ahead.toFixed(1) + (chunk.dropped ? ` (${chunk.dropped} left out)` : "");
  $("chunk").textContent = chunk.generation_chunk_index;
}

function remember(prompt, chunk) {
  const item = document.createElement("li");
  const when = document.createElement("span");
  when.textContent = ` from chunk ${chunk}`;
  item.append(prompt, when);
  $("history").prepend(item);
}

function buttons(playing) {
  for (const id of ["pause", "stop", "restart"]) $(id).disabled = !playing;
  if (!playing && session) $("restart").disabled = false;
  $("start").textContent = playing ? "Change the prompt" : "Start";
  $("start").disabled = playing && !session.started; // nothing can change before the video begins
  $("pause").disabled = !playing || !session.started;
  $("pause").textContent = "Pause";
}

function number(id) {
  return $(id).value.trim() === "" ? null : Number($(id).value);
}

function begin(format) {
  const prompt = $("prompt").value.trim();
  if (!prompt) return $("prompt").focus();
  play(prompt, number("seed"), format);
}

function play(prompt, seed, format, tries = 0) {
  fail("");
  clearTimeout(retry);
  session?.leave();
  $("history").replaceChildren();
  $("download").disabled = true;
  curtain("Starting …");
  say("");
  session = new Session(prompt, seed, format ?? (playable() ? "m4s" : "jpeg"), tries);
  buttons(true);
}

function playable() {
  return !new URLSearchParams(location.search).has("jpeg") && "MediaSource" in window && MediaSource.isTypeSupported(info.mime_type);
}

function change() {
  const options = { mode: $("mode").value };
  if (options.mode !== "cut") options.transition_chunks = number("transition") ?? 0;
  if (options.mode !== "cut" && number("fade") !== null) options.fade = number("fade");
  if (number("noise") !== null && ["recache", "flush"].includes(options.mode)) options.context_timestep = number("noise");
  fail("");
  session.interact($("prompt").value.trim(), options);
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!session || session.over || session.socket.readyState > WebSocket.OPEN) begin();
  else if (session.started) change();
  else say("Wait until the video begins.");
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
for (const id of ["video", "canvas"]) {
  $(id).addEventListener("keydown", (event) => {
    if (event.key !== " " || !session?.started || session.over) return;
    event.preventDefault();
    session.pause(!session.paused);
  });
  $(id).addEventListener("click", () => {
    if (session?.started && !session.over && session.paused) session.pause(false);
    else if (session && !session.over) $("video").play().catch(() => {});
  });
}
$("mode").addEventListener("change", () => {
  $("transition").disabled = $("mode").value === "cut";
  $("fade").disabled = $("mode").value === "cut";
  $("noise").disabled = !["recache", "flush"].includes($("mode").value);
  $("mode-hint").textContent = $("mode").selectedOptions[0].title;
});
$("pause").addEventListener("click", () => session.pause(!session.paused));
$("stop").addEventListener("click", () => session.stop());
$("restart").addEventListener("click", () => begin());
$("download").addEventListener("click", () => {
  const parts = [];
  let first;
  for (const part of session.kept) {
    const [bytes, back] = shifted(part.bytes, first);
    first ??= back;
    parts.push(bytes);
  }
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([...(session.head ? [session.head] : []), ...parts], { type: "video/mp4" }));
  link.download = "self-forcing.mp4";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
});

async function connect() {
  const response = await fetch("v1/info").catch(() => null);
  if (!response?.ok) {
    $("model").textContent = response?.status === 503 ? "The model is being loaded and compiled …" : "The server does not answer.";
    setTimeout(connect, RETRY_MS);
    return;
  }
  info = await response.json();
  $("model").textContent = info.model;
  $("model").title = info.description;
  $("prompt").maxLength = info.max_prompt;
  $("prompt").value ||= info.examples[0] ?? "";
  for (const option of [...$("mode").options]) if (!info.modes.includes(option.value)) option.remove();
  $("mode").value = info.default.mode;
  $("noise").value = info.default.context_timestep ?? "";
  $("fade").value = info.default.fade || "";
  $("mode").dispatchEvent(new Event("change"));
  for (const example of info.examples) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = example;
    button.addEventListener("click", () => { $("prompt").value = example; $("prompt").focus(); });
    $("examples").append(button);
  }
  $("start").disabled = false;
}

$("start").disabled = true;
connect();
