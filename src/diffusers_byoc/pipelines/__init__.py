from .pipeline_byoc import BYOCPipeline, BYOCPipelineOutput
from .schedulers import USABLE_SCHEDULERS


__all__ = ["USABLE_SCHEDULERS", "BYOCPipeline", "BYOCPipelineOutput"]
