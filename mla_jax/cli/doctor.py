"""`mla-jax doctor`: versions, devices, and which backend would run what, or why not.

With `--plan`: what a mesh would cost, whether or not there are devices for it.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from typing import Any

from mla_jax.cli import find_preset, mesh_sizes

PACKAGES = ("mla-jax", "jax", "jaxlib", "flax", "numpy", "jaxtyping", "safetensors", "tokenizers")


def add_parser(subparsers) -> None:
    p = subparsers.add_parser("doctor", help="versions, devices, and which backend would run")
    p.add_argument(
        "--preset", default="deepseek-v2-lite", help="the model whose shapes to ask about"
    )
    p.add_argument("--page-size", type=int, default=64)
    p.add_argument(
        "--plan",
        action="store_true",
        help="bytes a device and messages a decode step, for --mesh, --batch, --tokens, --dtype",
    )
    p.add_argument("--mesh", type=mesh_sizes, default={}, metavar="data=D,model=M,context=C")
    p.add_argument("--batch", type=int, default=1, metavar="N", help="rows (default 1)")
    p.add_argument("--tokens", type=int, default=4096, metavar="N", help="a row (default 4096)")
    p.add_argument("--dtype", choices=("fp8",), help="weights that FP8 checkpoints have in FP8")
    p.add_argument("--link-gb-s", type=float, metavar="X", help="measured, one direction")
    p.add_argument("--link-us", type=float, metavar="X", help="measured latency of a small message")
    p.add_argument("--bandwidth-gb-s", type=float, metavar="X", help="measured, of a device")
    p.add_argument("--tflop-s", type=float, metavar="X", help="measured, of a device")
    p.add_argument("--memory-gb", type=float, metavar="X", help="of a device; with the other four")
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=run)


def diagnose(preset: str, page_size: int) -> dict:
    """What `doctor` prints, as plain data."""
    import jax

    from pallas_kernels import (
        causal_prefill,
        expert_ffn,
        paged_decode,
        paged_prefill,
        routing,
        token_sparse,
    )
    from pallas_kernels.backend import Backend, choose, explain
    from pallas_kernels.device import current_device
    from pallas_kernels.paged_attention import PagedProblem

    config = find_preset(preset)
    mla = config.mla
    attention = {
        "heads": mla.n_heads,
        "latent": mla.kv_lora_rank,
        "rope": mla.qk_rope_head_dim,
        "page_size": page_size,
        "dtype": config.dtype,
        "batch": 1,
        "num_ids": -(-config.max_seq_len // page_size),
    }
    problems: dict[str, tuple[Sequence[Backend], Any]] = {
        "paged_decode": (
            paged_decode.BACKENDS,
            PagedProblem(op="paged_decode", tokens=1, **attention),
        ),
        "paged_prefill": (
            paged_prefill.BACKENDS,
            PagedProblem(op="paged_prefill", tokens=0, **attention),
        ),
    }
    if mla.index_n_heads:
        # A query's indices are its pages, of one token each.
        chosen = {**attention, "num_ids": mla.index_topk}
        problems["token_sparse"] = (
            token_sparse.BACKENDS,
            PagedProblem(op="token_sparse", tokens=0, **chosen),
        )
    problems["causal_prefill"] = (
        causal_prefill.BACKENDS,
        causal_prefill.CausalProblem(
            batch=1,
            tokens=1024,
            keys=1024,
            heads=mla.n_heads,
            width=mla.qk_head_dim,
            value_width=mla.v_head_dim,
            dtype=config.dtype,
            causal=True,
        ),
    )
    if config.moe is not None:
        problems["expert_ffn"] = (
            expert_ffn.BACKENDS,
            expert_ffn.ExpertProblem(
                tokens=1,
                active=config.moe.n_active,
                experts=config.moe.n_routed,
                inter=config.moe.inter_dim,
                dim=mla.dim,
                dtype=config.dtype,
            ),
        )
        rule = routing.RoutingRule(active=config.moe.n_active)
        problems["route"] = (
            routing.BACKENDS,
            routing.RoutingProblem(tokens=1, experts=config.moe.n_routed, rule=rule),
        )
    device = current_device()
    ops = {}
    for op, (backends, problem) in problems.items():
        reasons = explain(backends, problem, device)
        ops[op] = {
            "runs": choose(op, backends, problem, None).name,
            "not": {name: reason for name, reason in reasons.items() if reason is not None},
        }
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "versions": {"python": platform.python_version(), **versions},
        "devices": [f"{d.id}: {d.device_kind} ({d.platform})" for d in jax.devices()],
        "preset": preset,
        "operations": ops,
    }


def plan(args: argparse.Namespace) -> dict:
    """What `doctor --plan` prints, as plain data."""
    from mla_jax.sharding.estimate import Machine, estimate_step
    from mla_jax.sharding.plan import Link, plan_decode

    config = find_preset(args.preset)
    sizes = {"batch": args.batch, "tokens": args.tokens, "page_size": args.page_size, **args.mesh}
    sizes["dtype"] = args.dtype
    planned = plan_decode(config, **sizes)
    report = {"preset": args.preset, "mesh": args.mesh, **dataclasses.asdict(planned)}
    links = _all_or_none(args, "link_gb_s", "link_us")
    rates = _all_or_none(args, "bandwidth_gb_s", "tflop_s", "memory_gb")
    if links is not None:
        link = Link(gb_per_s=links["link_gb_s"], latency_us=links["link_us"])
        report["message_us"] = planned.message_seconds(link) * 1e6
        if rates is not None:
            machine = Machine(
                memory_gb=rates["memory_gb"],
                bandwidth_gb_s=rates["bandwidth_gb_s"],
                tflop_s=rates["tflop_s"],
                link=link,
            )
            step = estimate_step(config, machine, **sizes)
            report["parts_us"] = {part: seconds * 1e6 for part, seconds in step.parts.items()}
            report |= {"step_us": step.seconds * 1e6, "bound": step.bound, "fits": step.fits}
            report["tokens_per_s"] = step.tokens_per_s
    elif rates is not None:
        raise ValueError("--link-gb-s: got none, expected the link's numbers with the device's")
    return report


def _all_or_none(args: argparse.Namespace, *names: str) -> dict[str, float] | None:
    """These options' values. Errors: ValueError where only some are given."""
    values = {name: getattr(args, name) for name in names}
    missing = [f"--{name.replace('_', '-')}" for name, value in values.items() if value is None]
    if len(missing) == len(names):
        return None
    if missing:
        others = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        raise ValueError(f"{missing[0]}: got none, expected all of {others} or none")
    return values


def _print_plan(report: dict) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    mesh = " ".join(f"{axis}={size}" for axis, size in report["mesh"].items()) or "no mesh"
    console.print(f"{report['preset']} on {report['devices']} devices: {mesh}")
    for name in ("weight", "cache", "logits"):
        console.print(f"{name:>8}  {report[f'{name}_bytes'] / 1e9:.3f} GB a device")
    for m in report["messages"]:
        console.print(
            f"{m['kind']:>10} over {m['axis']}: {m['count']} a step, {m['bytes'] / 1e3:.1f} kB each"
        )
    if "message_us" in report:
        console.print(f"messages of a step: {report['message_us']:.1f} us on this link")
    if "step_us" in report:
        console.print(
            f"at least {report['step_us']:.1f} us a step, {report['tokens_per_s']:,.0f} tokens/s, "
            f"bound by {report['bound']}; {'fits' if report['fits'] else 'does not fit'}"
        )
        parts = report["parts_us"].items()
        console.print("  ".join(f"{part} {micros:.1f} us" for part, micros in parts))


def run(args: argparse.Namespace) -> int:
    if args.plan:
        report = plan(args)
        if args.json:
            print(json.dumps(report, indent=1))
        else:
            _print_plan(report)
        return 0
    report = diagnose(args.preset, args.page_size)
    if args.json:
        print(json.dumps(report, indent=1))
        return 0
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print("  ".join(f"{name} {version}" for name, version in report["versions"].items()))
    for device in report["devices"]:
        console.print(f"device {device}", highlight=False)
    table = Table(title=f"backends for {report['preset']}", title_justify="left")
    for column in ("operation", "runs", "why not another"):
        table.add_column(column, overflow="fold")
    for op, entry in report["operations"].items():
        reasons = "\n".join(f"{name}: {reason}" for name, reason in entry["not"].items())
        table.add_row(op, entry["runs"] or "nothing", reasons)
    console.print(table)
    return 0
