"""Train a GPT on a memory-mapped file of tokens and prune it by EMP meanwhile: one file, as small GPT repositories.

    python gpt_train.py --prepare --data tokens        # train.bin and val.bin, of Python's own standard library
    python gpt_train.py --data tokens --steps 300      # a small model, minutes on a CPU
    torchrun --nproc_per_node 8 gpt_train.py --data tokens --init gpt2 --vocab 50257 --length 1024 --amp --compile
    python gpt_train.py --data tokens ... --resume out/step-1000.pt

train.bin and val.bin are uint16 tokens, one after the other, of any tokenizer whose --vocab is below 65536 (bytes:
256). What is EMP's is marked "EMP:".
"""

import argparse
import contextlib
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

from emp_callbacks import EMPPruner


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="tokens", help="folder with train.bin and val.bin (default: tokens)")
    parser.add_argument("--prepare", action="store_true", help="write them, of the standard library's sources, and end")
    parser.add_argument("--out", default="out", help="folder for checkpoints and the trajectory (default: out)")
    parser.add_argument("--resume", help="checkpoint to go on from")
    parser.add_argument("--init", metavar="NAME", help="Hugging Face name or folder of a GPT-2 to begin from, as gpt2")
    parser.add_argument("--vocab", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of a micro-batch")
    parser.add_argument("--accumulate", type=int, default=4, help="micro-batches of a step, over all processes")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--amp", action="store_true", help="bfloat16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--eval-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    emp = parser.add_argument_group("EMP")
    emp.add_argument("--emp-every", type=int, default=50, metavar="STEPS", help="refresh the masks every so many steps")
    emp.add_argument("--emp-stop", type=int, metavar="STEP", help="last refresh; the rest of the training heals")
    emp.add_argument("--emp-mode", default="feedback", choices=("feedback", "project", "freeze"))
    emp.add_argument("--emp-target", default="weights", choices=("weights", "heads", "neurons"))
    emp.add_argument("--emp-criterion", help="default: the target's first")
    emp.add_argument("--emp-beta", type=float, default=1.0, help="factor on N_eff")
    emp.add_argument("--emp-min-density", type=float, default=0.0, help="keep at least this share")
    return parser.parse_args()


def prepare(folder):
    """Write the sources of the standard library as bytes: the last tenth is for validation."""
    sources = sorted(Path(os.__file__).parent.glob("*.py"))
    tokens = np.frombuffer(b"\n".join(path.read_bytes() for path in sources), dtype=np.uint8).astype(np.uint16)
    Path(folder).mkdir(parents=True, exist_ok=True)
    cut = len(tokens) * 9 // 10
    for name, part in (("train", tokens[:cut]), ("val", tokens[cut:])):
        part.tofile(Path(folder, f"{name}.bin"))
        print(f"{Path(folder, name)}.bin: {len(part):,} tokens")


def batch_of(args, part, number, device):
    """Return the micro-batch of a number: the same in every run, on whichever process."""
    tokens = np.memmap(Path(args.data, f"{part}.bin"), dtype=np.uint16, mode="r")
    source = np.random.default_rng((args.seed, number, part == "val"))
    chosen = source.integers(len(tokens) - args.length, size=args.batch_size)
    batch = torch.from_numpy(np.stack([tokens[i : i + args.length] for i in chosen]).astype(np.int64))
    return batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch


def rate(step, args):
    """Return the learning rate: linear warm-up, then a cosine down to a tenth."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done))))


@torch.no_grad()
def validate(model, args, device, batches=8):
    model.eval()
    held_out = (batch_of(args, "val", i, device) for i in range(batches))
    losses = [float(model(input_ids=x, labels=x).loss) for x in held_out]
    model.train()
    return sum(losses) / len(losses)


def main():
    args = parse()
    if args.prepare:
        prepare(args.data)
        return
    if not Path(args.data, "train.bin").exists():
        raise SystemExit(f"{Path(args.data, 'train.bin')} does not exist: write it with --prepare, or name --data")
    distributed, cuda = "RANK" in os.environ, torch.cuda.is_available()
    if distributed:
        dist.init_process_group("nccl" if cuda else "gloo")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if args.accumulate % ranks:
        raise SystemExit(f"--accumulate {args.accumulate} micro-batches cannot be shared by {ranks} processes alike")

    torch.manual_seed(args.seed)
    sizes = {"n_layer": args.layers, "n_head": args.heads, "n_embd": args.width, "n_positions": args.length}
    rates = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)
    config = GPT2Config(vocab_size=args.vocab, bos_token_id=None, eos_token_id=None, use_cache=False, **sizes, **rates)
    model = GPT2LMHeadModel.from_pretrained(args.init) if args.init else GPT2LMHeadModel(config)
    model.to(device)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    wrapped = torch.compile(model) if args.compile else model
    wrapped = DistributedDataParallel(wrapped) if distributed else wrapped

    # EMP: a pruner around the wrapped model and its optimizer.
    pruner = EMPPruner(
        wrapped, optimizer, every_n_steps=args.emp_every, stop=args.emp_stop, mode=args.emp_mode,
        target=args.emp_target, criterion=args.emp_criterion, beta=args.emp_beta, min_density=args.emp_min_density,
        trajectory_path=f"{args.out}/emp_trajectory.jsonl",
    )  # fmt: skip

    first = 0
    if args.resume:
        state = torch.load(args.resume, map_location=device, weights_only=True)
        for name, thing in (("model", model), ("optimizer", optimizer), ("emp", pruner)):
            thing.load_state_dict(state[name])
        first = state["step"]

    own = args.accumulate // ranks
    autocast = torch.autocast(device.type, torch.bfloat16) if args.amp else contextlib.nullcontext()
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, args)
        optimizer.zero_grad()
        total = 0.0
        for micro in range(own):
            x = batch_of(args, "train", step * args.accumulate + rank * own + micro, device)
            last = micro == own - 1
            with wrapped.no_sync() if distributed and not last else contextlib.nullcontext():
                with autocast:
                    loss = wrapped(input_ids=x, labels=x).loss / own
                loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        pruner.step()  # EMP: after every optimizer step
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            pruner.share_evidence()  # EMP: one rank saves for all
            if rank == 0:
                print(
                    f"step {step + 1}/{args.steps}: loss {total:.3f}, validation {validate(model, args, device):.3f}, "
                    f"{pruner.density:.1%} of the {args.emp_target} kept", flush=True,
                )  # fmt: skip
                Path(args.out).mkdir(parents=True, exist_ok=True)
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                torch.save({**state, "emp": pruner.state_dict()}, f"{args.out}/new.pt")
                os.replace(f"{args.out}/new.pt", f"{args.out}/step-{step + 1}.pt")
                Path(args.out, f"step-{step + 1 - 2 * args.eval_every}.pt").unlink(missing_ok=True)
    pruner.finalize()  # EMP: hooks off; the model stays masked
    if rank == 0:
        model.save_pretrained(f"{args.out}/model")
        print(f"masked weights: {args.out}/model, for GPT2LMHeadModel.from_pretrained")
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
