"""What a recipe will do, before it does it: sizes, memory, steps, refreshes, what they send, where files go.

The model is built without memory (torch's `meta` device), nothing is trained, and no GPU is asked for, whatever the
recipe asks for.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch import nn

from emp_callbacks.backends import detect_backend
from emp_callbacks.blame import raised_by_us
from emp_callbacks.config import EMPConfig
from emp_callbacks.integrations.lightning import EMPCallback
from emp_callbacks.integrations.record import file_name, own_name
from emp_callbacks.layer import Layer, WeightLayer
from emp_callbacks.layer.mask_mode import MASK_MODES
from emp_callbacks.pruning.refresher import Refresher
from emp_callbacks.pruning.traffic import Spread, Traffic, refresh_traffic
from emp_callbacks.study.quiet import quiet
from emp_callbacks.study.recipe.length import Length, training_length
from emp_callbacks.study.recipe.memory import Masked, Sizes, memory_of
from emp_callbacks.study.recipe.parts import ANYWHERE
from emp_callbacks.study.recipe.places import Folder, folder_of, log_folder
from emp_callbacks.study.recipe.reading import read_recipe
from emp_callbacks.study.recipe.recipe import Recipe
from emp_callbacks.study.recipe.strategy import Strategy, strategy_of
