"""From a finished model to files that other programs run, and from such files back to a model that predicts."""

from __future__ import annotations

from der_fast.deployment.deployed import DeployedModel, load
from der_fast.deployment.exporter import Exported, export

__all__ = ["DeployedModel", "Exported", "export", "load"]
