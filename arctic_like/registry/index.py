"""The built-in parts by family and name: where each lives, without importing it.

A test walks the package and fails if a class is missing here.
"""

from __future__ import annotations

BUILT_IN: dict[str, dict[str, str]] = {
    "trainer": {
        "sft": "arctic_like.trainer.sft:SFTTrainer",
        "causal": "arctic_like.trainer.causal:CausalTrainer",
        "dpo": "arctic_like.trainer.dpo:DPOTrainer",
        "gan": "arctic_like.trainer.gan:GANTrainer",
        "distill": "arctic_like.trainer.distill:DistillTrainer",
        "supervised": "arctic_like.trainer.supervised:SupervisedTrainer",
    },
    "criterion": {
        "cross_entropy": "arctic_like.trainer.criteria:CrossEntropy",
        "mse": "arctic_like.trainer.criteria:MSE",
        "l1": "arctic_like.trainer.criteria:L1",
        "smooth_l1": "arctic_like.trainer.criteria:SmoothL1",
        "bce_with_logits": "arctic_like.trainer.criteria:BCEWithLogits",
        "module.Class": "arctic_like.trainer.criteria:DottedCriterion",
    },
    "metric": {
        "accuracy": "arctic_like.trainer.criteria:Accuracy",
        "confusion_matrix": "arctic_like.trainer.criteria:ConfusionMatrix",
        "mae": "arctic_like.trainer.criteria:MAE",
        "rmse": "arctic_like.trainer.criteria:RMSE",
        "r2": "arctic_like.trainer.criteria:R2",
        "module.Class": "arctic_like.trainer.criteria:DottedMetric",
    },
    "data": {
        "sft": "arctic_like.data.factory:SFTDataFactory",
        "causal": "arctic_like.data.factory:CausalDataFactory",
        "dpo": "arctic_like.data.preference:DPODataFactory",
        "kto": "arctic_like.data.preference:KTODataFactory",
        "torch": "arctic_like.data.any_torch:TorchDataFactory",
    },
    "source": {
        "huggingface": "arctic_like.data.sources:HFSource",
        "huggingface_instruct": "arctic_like.data.sources:HFInstructSource",
        "huggingface_causal": "arctic_like.data.sources:HFCausalSource",
        "file": "arctic_like.data.sources:FileSource",
        "python": "arctic_like.data.python_source:PythonSource",
        "sql": "arctic_like.data.sql:SQLSource",
        "snowflake": "arctic_like.data.snowflake:SnowflakeSource",
        "snowflake_table": "arctic_like.data.snowflake:SnowflakeTableSource",
        "snowflake_dataset": "arctic_like.data.snowflake:SnowflakeDatasetSource",
    },
    "model": {
        "huggingface": "arctic_like.model.huggingface:HFModelFactory",
        "liger": "arctic_like.model.liger:LigerModelFactory",
        "torch": "arctic_like.model.any_torch:TorchModelFactory",
    },
    "tokenizer": {
        "huggingface": "arctic_like.tokenizer.huggingface:HFTokenizerFactory",
        "byte": "arctic_like.tokenizer.byte:ByteTokenizerFactory",
        "none": "arctic_like.tokenizer.none:NoTokenizerFactory",
    },
    "optimizer": {
        "adamw": "arctic_like.optimizer.adam:AdamWFactory",
        "fused_adam": "arctic_like.optimizer.adam:FusedAdamFactory",
        "fused_adam_moe": "arctic_like.optimizer.adam:FusedAdamMoEFactory",
        "cpu_adam": "arctic_like.optimizer.adam:CPUAdamFactory",
        "module.Class": "arctic_like.optimizer.dotted:DottedOptimizerFactory",
    },
    "scheduler": {
        "huggingface": "arctic_like.scheduler.huggingface:HFSchedulerFactory",
        "wsd": "arctic_like.scheduler.closed_form:WSDFactory",
        "cosine_with_floor": "arctic_like.scheduler.closed_form:CosineWithFloorFactory",
        "plateau": "arctic_like.scheduler.plateau:PlateauFactory",
        "module.Class": "arctic_like.scheduler.dotted:DottedSchedulerFactory",
    },
    "checkpoint": {
        "deepspeed": "arctic_like.checkpoint.deepspeed:DeepSpeedCheckpoint",
        "huggingface": "arctic_like.checkpoint.huggingface:HFCheckpoint",
    },
    "exporter": {
        "safetensors": "arctic_like.checkpoint.exporters:SafetensorsExporter",
        "torchscript": "arctic_like.checkpoint.exporters:TorchScriptExporter",
        "onnx": "arctic_like.checkpoint.exporters:ONNXExporter",
    },
    "callback": {
        "early_stopping": "arctic_like.callbacks.early_stopping:EarlyStopping",
        "spike_detection": "arctic_like.callbacks.spikes:SpikeDetection",
        "overfitting_warning": "arctic_like.callbacks.overfitting:OverfittingWarning",
        "exact_match": "arctic_like.callbacks.exact_match:ExactMatch",
        "ema": "arctic_like.callbacks.ema:EMA",
        "neftune": "arctic_like.callbacks.neftune:NEFTune",
        "generate_samples": "arctic_like.callbacks.generate_samples:GenerateSamples",
        "throughput": "arctic_like.callbacks.throughput:Throughput",
        "heartbeat": "arctic_like.callbacks.heartbeat:Heartbeat",
        "watchdog": "arctic_like.callbacks.heartbeat:Watchdog",
        "profiler": "arctic_like.callbacks.profiler:Profiler",
        "freeze": "arctic_like.callbacks.freeze:Freeze",
        "schedule_value": "arctic_like.callbacks.schedule_value:ScheduleValue",
        "gc_control": "arctic_like.callbacks.gc_control:GCControl",
        "code_snapshot": "arctic_like.callbacks.code_snapshot:CodeSnapshot",
        "histograms": "arctic_like.callbacks.histograms:Histograms",
        "lr_finder": "arctic_like.callbacks.lr_finder:LRFinder",
        "cuda_memory": "arctic_like.callbacks.profiler:CUDAMemory",
    },
    "tracker": {
        "console": "arctic_like.tracking.console:ConsoleTracker",
        "tensorboard": "arctic_like.tracking.tensorboard:TensorBoardTracker",
        "wandb": "arctic_like.tracking.wandb:WandbTracker",
    },
}
