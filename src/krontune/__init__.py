"""krontune: small Kronecker adapters, selected data and verified reinforcement learning for 4-bit models.

Each room works alone: `krontune.adapters`, `krontune.data_selection`, `krontune.rl`; `krontune.recipes`
chains them from one file.
"""

from importlib.metadata import version

__version__ = version("krontune")
