"""Train a timm model and prune it by EMP while it trains, in the style of timm's own script.

    python timm_train.py --demo                       # scikit-learn's digits, a minute on a CPU
    python timm_train.py DATA --model resnet50 --epochs 90 --emp-every 500 --emp-mode freeze --emp-min-density 0.1
    torchrun --nproc_per_node 4 timm_train.py DATA --model deit_small_patch16_224 --layer-decay 0.75 --amp
    python timm_train.py DATA ... --resume out/epoch-9.pt

DATA has the layout of ImageNet: DATA/train/CLASS/*.png and DATA/val/CLASS/*.png. What is EMP's is marked "EMP:".
"""

import argparse
import contextlib
import os
import random
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from timm.data import Mixup, create_dataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, NativeScaler, accuracy
from torch.nn.parallel import DistributedDataParallel

from emp_callbacks import EMPPruner


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", help="folder with train/ and val/")
    parser.add_argument("--demo", action="store_true", help="make a folder of digits in OUT/digits, and train on it")
    parser.add_argument("--out", default="out", help="folder for checkpoints and the trajectory (default: out)")
    parser.add_argument("--resume", help="checkpoint to go on from")
    parser.add_argument("--model", help="name in timm (default: resnet50; --demo: test_vit, which is tiny)")
    parser.add_argument("--pretrained", action="store_true", help="begin from timm's weights")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64, help="of each process")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--opt", default="adamw", help="name in timm")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument(
        "--layer-decay", type=float, help="factor on the learning rate from layer to layer, such as 0.75"
    )
    parser.add_argument("--clip-grad", type=float, default=1.0)
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--mixup", type=float, default=0.0)
    parser.add_argument("--cutmix", type=float, default=0.0)
    parser.add_argument("--ema-decay", type=float, default=0.99)
    parser.add_argument(
        "--amp", action="store_true", help="float16 on a GPU with timm's NativeScaler, bfloat16 on a CPU"
    )
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    emp = parser.add_argument_group("EMP")
    emp.add_argument("--emp-every", type=int, default=50, metavar="STEPS", help="refresh the masks every so many steps")
    emp.add_argument("--emp-stop", type=int, metavar="STEP", help="last refresh; the rest of the training heals")
    emp.add_argument("--emp-mode", default="feedback", choices=("feedback", "project", "freeze"))
    emp.add_argument("--emp-target", default="weights", choices=("weights", "heads", "neurons"))
    emp.add_argument("--emp-criterion", help="default: the target's first")
    emp.add_argument("--emp-beta", type=float, default=1.0, help="factor on N_eff")
    emp.add_argument("--emp-min-density", type=float, default=0.0, help="keep at least this share")
    emp.add_argument("--emp-pattern", metavar="N:M", help="2:4 and the like, in place of N_eff")
    return parser.parse_args()


def digits(folder):
    """Write scikit-learn's digits as an image folder, 8 x 8 pixels, every fifth for validation."""
    from PIL import Image
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = Path(folder, "val" if i % 5 == 0 else "train", str(label), f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image.reshape(8, 8) * 15.9).astype("uint8")).convert("RGB").save(path)
    return folder


def loader_of(part, args, device):
    dataset = create_dataset("", root=args.data, split=part)
    train = part == "train"
    return dataset, create_loader(
        dataset, (3, args.img_size, args.img_size), args.batch_size, is_training=train, num_workers=args.workers,
        use_prefetcher=False, distributed=train and dist.is_initialized(), device=device, persistent_workers=False,
        scale=(0.8, 1.0), hflip=0.0, color_jitter=None, crop_pct=1.0,
    )  # fmt: skip


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@torch.inference_mode()
def validate(model, loader, device):
    model.eval()
    right = seen = 0.0
    for images, labels in loader:
        found = accuracy(model(images.to(device)), labels.to(device))[0]
        right, seen = right + float(found) * len(labels), seen + len(labels)
    return right / seen


def main():
    args = parse()
    distributed = "RANK" in os.environ
    cuda = torch.cuda.is_available()
    if distributed:
        dist.init_process_group("nccl" if cuda else "gloo")
    rank = dist.get_rank() if distributed else 0
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if args.demo:
        args.img_size, args.workers, args.model = 32, 0, args.model or "test_vit"
        args.data = f"{args.out}/digits"
        if rank == 0 and not Path(args.data).exists():
            digits(args.data)
        if distributed:
            dist.barrier()
    if args.data is None:
        raise SystemExit("name a folder of images, or --demo")

    args.model = args.model or "resnet50"
    seed_everything(args.seed)
    dataset, train_loader = loader_of("train", args, device)
    _, val_loader = loader_of("val", args, device)
    classes = len(dataset.reader.class_to_idx)
    sizes = {"img_size": args.img_size} if "vit" in args.model else {}
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model = timm.create_model(args.model, pretrained=args.pretrained, num_classes=classes, **sizes)
    model.to(device, memory_format=layout)
    options = {"layer_decay": args.layer_decay} if args.layer_decay else {}
    optimizer = create_optimizer_v2(model, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay, **options)
    schedule, epochs = create_scheduler_v2(
        optimizer, "cosine", num_epochs=args.epochs, warmup_epochs=1, step_on_epochs=False,
        updates_per_epoch=len(train_loader),
    )  # fmt: skip
    mixed = args.mixup > 0 or args.cutmix > 0
    mixup = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=classes) if mixed else None
    loss_of = SoftTargetCrossEntropy() if mixed else LabelSmoothingCrossEntropy(args.smoothing)
    scaler = NativeScaler(device.type) if args.amp and cuda else None
    autocast = torch.autocast(device.type, torch.float16 if cuda else torch.bfloat16) if args.amp else None
    ema = ModelEmaV3(model, decay=args.ema_decay)
    wrapped = DistributedDataParallel(model) if distributed else model

    # EMP: one pruner around model and optimizer, and the average is kept masked.
    pruner = EMPPruner(
        wrapped, optimizer, every_n_steps=args.emp_every, stop=args.emp_stop, mode=args.emp_mode,
        target=args.emp_target, criterion=args.emp_criterion, beta=args.emp_beta, pattern=args.emp_pattern,
        min_density=args.emp_min_density, trajectory_path=f"{args.out}/emp_trajectory.jsonl",
    )  # fmt: skip
    pruner.add_average(ema)

    first = 0
    if args.resume:
        state = torch.load(args.resume, map_location=device, weights_only=True)
        for name, thing in (("model", model), ("ema", ema.module), ("optimizer", optimizer), ("emp", pruner)):
            thing.load_state_dict(state[name])
        if scaler is not None:
            scaler.load_state_dict(state["scaler"])
        first = state["epoch"] + 1

    for epoch in range(first, epochs):
        seed_everything(args.seed + 1000 * epoch + rank)  # so that a resumed run sees the same batches
        if distributed:
            train_loader.sampler.set_epoch(epoch)
        wrapped.train()
        total = 0.0
        for i, (images, labels) in enumerate(train_loader):
            step = epoch * len(train_loader) + i
            images, labels = images.to(device, memory_format=layout), labels.to(device)
            if mixup is not None:
                keep = len(images) - len(images) % 2  # Mixup works on pairs
                images, labels = mixup(images[:keep], labels[:keep])
            with autocast or contextlib.nullcontext():
                loss = loss_of(wrapped(images), labels)
            optimizer.zero_grad()
            if scaler is not None:
                scaler(loss, optimizer, clip_grad=args.clip_grad, parameters=model.parameters())
            else:
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
                optimizer.step()
            pruner.step()  # EMP: counts applied steps, refreshes the masks when one is due
            ema.update(model, step=step)
            schedule.step_update(step + 1)
            total += float(loss.detach())
        pruner.share_evidence()  # EMP: one rank saves for all
        if rank == 0:
            top = validate(model, val_loader, device)
            averaged = validate(ema.module, val_loader, device)
            print(
                f"epoch {epoch + 1}/{epochs}: loss {total / len(train_loader):.3f}, accuracy {top:.2f} %, "
                f"of the average {averaged:.2f} %, {pruner.density:.1%} of the {args.emp_target} kept", flush=True,
            )  # fmt: skip
            Path(args.out).mkdir(parents=True, exist_ok=True)
            state = {"model": model.state_dict(), "ema": ema.module.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"emp": pruner.state_dict(), "epoch": epoch}
            state |= {"scaler": scaler.state_dict()} if scaler is not None else {}
            torch.save(state, f"{args.out}/new.pt")
            os.replace(f"{args.out}/new.pt", f"{args.out}/epoch-{epoch + 1}.pt")
            Path(args.out, f"epoch-{epoch - 1}.pt").unlink(missing_ok=True)
    pruner.finalize()  # EMP: hooks off; model and average stay masked
    if rank == 0:
        for name, trained in (("model", model), ("ema", ema.module)):
            weights = {key: value.contiguous() for key, value in trained.state_dict().items()}
            save_file(weights, f"{args.out}/{name}.safetensors")
        print(f"masked weights: {args.out}/model.safetensors, their average: {args.out}/ema.safetensors")
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
