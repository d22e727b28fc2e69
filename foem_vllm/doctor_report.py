"""`foem doctor`'s findings as tables."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

MOST_PROBLEMS = 10


def print_report(found: dict) -> None:
    """found: what `doctor.examine` returns."""
    console = Console()

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False, highlight=False)

    if found["method"] is None:
        say(f"{found['model']}: not quantized ({found['dtype']}); vLLM serves it as it is, `foem quantize` makes it smaller")
    elif found["ours"] is None:
        say(f"{found['model']}: quantized with {found['method']}, not GPTQ; serve it without --quantization foem")
    elif found["layers"]:
        console.print(layer_table(found))
        for line in (*slow_lines(found["layers"]), *memory_lines(found["memory"], found["tensor_parallel_size"])):
            say(line)
    for note in found["notes"]:
        say(f"note: {note}")
    problems = [f"{p['tensor']} {p['problem']}; {p['remedy']}" for p in found["problems"]]
    for problem in problems[:MOST_PROBLEMS]:
        say(f"problem: {problem}")
    if len(problems) > MOST_PROBLEMS:
        say(f"problem: {len(problems) - MOST_PROBLEMS} more; `foem doctor --json` lists them all")
    for engine, name in (("ours", "--quantization foem"), ("stock", "stock vLLM (--quantization gptq)")):
        if found[engine]:
            own = "; ".join(reason for reason in found[engine]["why"] if reason not in problems)
            say(f"{name}: {'serves it' if found[engine]['served'] else 'does not serve it'}{': ' + own if own else ''}")


def layer_table(found: dict) -> Table:
    ranks = found["tensor_parallel_size"]
    rank = f", one of {ranks} ranks" + (" that share experts out" if found["expert_parallel"] else "") if ranks > 1 else ""
    table = Table(title=f"{found['model']} on {found['device']}, {found['dtype']}{rank}")
    for column in ("layer", "times", "weights", "N x K", "kernel", "size"):
        table.add_column(column, justify="right" if column in ("times", "N x K", "size") else "left")
    for row in found["layers"]:
        group = "row" if row["group_size"] == row["k"] else row["group_size"]
        order = ", act-order" if row["act_order"] else ""
        weights = f"{row['bits']} bit, group {group}, {'sym' if row['symmetric'] else 'asym'}{order}"
        shape = f"{row['n']} x {row['k']}"
        table.add_row(row["name"], str(row["count"]), weights, shape, row["kernel"], amount(row["bytes"] * row["count"]))
    return table


def amount(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def slow_lines(layers: list[dict]) -> list[str]:
    """Why products are left to the reference kernel, each reason once."""
    names: dict[str, list[str]] = {}
    for row in layers:
        if row["why_not_faster"]:
            names.setdefault(row["why_not_faster"], []).append(row["name"])
    return [f"note: {', '.join(dict.fromkeys(who))} slow, by the reference kernel: {why}" for why, who in names.items()]


def memory_lines(memory: dict, ranks: int) -> list[str]:
    quantized, rest = memory["quantized"], memory["rest"]
    whose = " of a rank" if ranks > 1 else ""
    lines = [f"weights{whose}: {amount(quantized + rest)}, {amount(quantized)} quantized and {amount(rest)} not"]
    if memory["budget"] is None:
        return [*lines, "room for the KV cache: give --memory, since this GPU is not here"]
    if memory["kv_room"] <= 0:
        return [*lines, f"room for the KV cache: none, the weights do not fit {amount(memory['budget'])}"]
    room = f"room for the KV cache in {amount(memory['budget'])}: {amount(memory['kv_room'])}"
    if memory["kv_tokens"] is None:
        return [*lines, f"{room}; config.json does not say what a token takes"]
    longest = memory["max_position_embeddings"]
    full = f", {memory['kv_tokens'] / longest:,.1f} sequences of {longest}" if longest else ""
    return [*lines, f"{room} or {memory['kv_tokens']:,} tokens{full}; activations and other processes need some of it"]
