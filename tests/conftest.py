"""Makes `worlds` and `pipelines`, the helpers beside this file, importable from every test below it."""

import warnings

import torch

torch.set_num_threads(min(torch.get_num_threads(), 4))  # the nets here are tiny
warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
