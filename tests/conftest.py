"""Makes `worlds` and `pipelines`, the helpers beside this file, importable from every test below it."""

import torch

torch.set_num_threads(1)  # the nets here are tiny: threads would wait for each other
