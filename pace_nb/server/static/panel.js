// The engine's panel: what /metrics says, in figures for a person.

/** Sums and counts of the samples of a Prometheus text, by name without the prefix before ":". */
export function read(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const match = /^\w+:(\w+)(?:\{.*\})? (\S+)$/.exec(line);
    if (!match) continue;
    const before = found.get(match[1]) ?? { sum: 0, count: 0 };
    found.set(match[1], { sum: before.sum + Number(match[2]), count: before.count + 1 });
  }
  return found;
}

export class Panel {
  constructor(byId) {
    this._byId = byId;
    this._before = null;
  }

  /** Show the metrics of now, `now` in ms. */
  show(text, now) {
    const found = read(text);
    const sum = (name) => found.get(name)?.sum;
    this._set("running", sum("num_requests_running"));
    this._set("waiting", sum("num_requests_waiting"));
    const usage = found.get("kv_cache_usage_perc");
    const share = usage && usage.sum / usage.count; // engines' caches are of one size
    this._set("kv", share === undefined ? undefined : percent(share));
    this._byId("kv-bar").value = share ?? 0;
    this._showThroughput(sum("generation_tokens_total"), now);
    const drafts = sum("spec_decode_num_draft_tokens_total");
    this._byId("acceptance-row").hidden = drafts === undefined;
    const accepted = sum("spec_decode_num_accepted_tokens_total");
    this._set("acceptance", drafts ? percent(accepted / drafts) : undefined);
    const up = found.get("engine_up");
    this._byId("engines-row").hidden = !(up?.count > 1);
    if (up) this._set("engines", `${up.sum} of ${up.count}`);
  }

  /** There is nothing to show. */
  clear() {
    this._before = null;
    for (const id of ["running", "waiting", "kv", "throughput", "acceptance"]) this._set(id);
    this._byId("kv-bar").value = 0;
  }

  _showThroughput(tokens, now) {
    const before = this._before;
    this._before = tokens === undefined ? null : { tokens, now };
    if (!before || tokens === undefined || now <= before.now || tokens < before.tokens) return;
    const rate = (tokens - before.tokens) / ((now - before.now) / 1000);
    this._set("throughput", rate < 10 ? rate.toFixed(1) : Math.round(rate));
  }

  _set(id, value = "–") {
    this._byId(id).textContent = String(value);
  }
}

const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;
