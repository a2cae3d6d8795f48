"""Formats numbers for readers of the card and the report."""

from __future__ import annotations

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.json_types import JsonFields

NONE = "–"
STAGES = {  # in the order in which readers compare them
    "teacher": "teacher",
    "random": "cut at random",
    "sliced": "pruned, plain slices",
    "pruned": "pruned",
    "distilled": "distilled",
}
SIZES = {
    "num_layers": "layers",
    "hidden_size": "hidden size",
    "ffn_hidden_size": "FFN width",
    "num_attention_heads": "attention heads",
    "num_query_groups": "query groups",
    "head_dim": "head dimension",
    "vocab_size": "vocabulary",
}
OF_LATENTS = {"kv_lora_rank": "latent of keys and values", "q_lora_rank": "latent of queries"}
OF_MAMBA = {"mamba_num_heads": "Mamba heads", "mamba_head_dim": "Mamba head dimension"}
EXPERTS = {  # of a mixture
    "num_moe_experts": "experts",
    "moe_router_topk": "experts of a token",
    "moe_ffn_hidden_size": "width of an expert",
}
CONTEXT = 4096  # tokens of the KV cache in the table


def count(value: float) -> str:
    """134515008 -> 134,515,008"""
    return f"{value:,.0f}"


def short_count(value: float) -> str:
    """134515008 -> 134.5 M"""
    for size, letter, digits in ((1e9, "B", 2), (1e6, "M", 1), (1e3, "k", 1)):
        if value >= size:
            return f"{value / size:.{digits}f} {letter}"
    return f"{value:.0f}"


def memory(size: float) -> str:
    """269030016 -> 269.0 MB (decimal, as file sizes are)"""
    for unit, letter in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {letter}"
    return f"{size:.0f} B"


def seconds(value: float) -> str:
    """75.2 -> 1 min 15 s"""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def seconds_of(value: float) -> str:
    """0.0321 -> 32 ms, 1.25 -> 1.25 s"""
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.2f} s"


def change(before: float, after: float) -> str:
    """The change against `before` in per cent, with a true minus sign; empty if nothing changed."""
    if before == after:
        return ""
    return f"{(after / before - 1) * 100:+.1f} %".replace("-", "−")


def number(value: float | None, digits: int = 3) -> str:
    """A number that fits a column of perplexities from 17.2 to 9.70e7; NONE for None."""
    if value is None:
        return NONE
    if abs(value) >= 1e6:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.{digits if abs(value) < 1000 else 0}f}"


def result_cells(row: JsonFields) -> list[str]:
    """Parameters, loss, perplexity, bits per byte and tokens of a row of numbers.json."""
    quality = number(row["loss"]), number(row["perplexity"], 2), number(row["bits_per_byte"])
    return [count(row["parameters"]), *quality, count(row["tokens"])]


def stage_order(stage: str) -> tuple[int, str]:
    known = list(STAGES)
    return (known.index(stage) if stage in known else len(known), stage)


def size_rows(source: Architecture, target: Architecture) -> list[tuple[str, str, str, str]]:
    """(what, before, after, change) for every size that a cut can change."""
    rows = [(what, count(a), count(b), change(a, b)) for what, a, b in _sizes(source, target)]
    for what, batch in (("weights in bf16", 0), (f"weights and KV cache of {CONTEXT:,} tokens, bf16", 1)):
        a, b = (sizes.memory(batch=batch, context=CONTEXT) for sizes in (source, target))
        rows.append((what, memory(a), memory(b), change(a, b)))
    return rows


def _sizes(source: Architecture, target: Architecture) -> list[tuple[str, int, int]]:
    mixture = source.num_moe_experts and target.num_moe_experts
    shared = {"moe_shared_expert_intermediate_size": "width of the shared expert"}
    experts = EXPERTS | (shared if source.moe_shared_expert_intermediate_size else {})
    named = {**SIZES, **(experts if mixture else {}), **(OF_MAMBA if source.hybrid_pattern else {})}
    if source.kv_lora_rank:  # one latent for all heads
        latents = {field: what for field, what in OF_LATENTS.items() if getattr(source, field)}
        named = {field: what for field, what in named.items() if field != "num_query_groups"} | latents
    sizes = [(what, getattr(source, field), getattr(target, field)) for field, what in named.items()]
    if source.hybrid_pattern:
        kinds = {"Mamba layers": "mamba_layers", "attention layers": "attention_layers", "MLP layers": "dense_layers"}
        sizes += [(what, len(getattr(source, kind)), len(getattr(target, kind))) for what, kind in kinds.items()]
    sizes.append(("parameters", source.parameters(), target.parameters()))
    if mixture:
        at_work = source.parameters(active=True), target.parameters(active=True)
        sizes.append(("parameters at work on a token", *at_work))
    without = source.parameters(embeddings=False), target.parameters(embeddings=False)
    return [*sizes, ("parameters without embeddings", *without)]
