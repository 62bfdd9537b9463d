"""Every key a user may state: its type, its limits, its default, and one sentence that is also its help text.

The sentence under a field becomes the description in the JSON schema, in error messages and in docs/config.md.
A recipe (model, augmentation, schedule) is stated by a mode (`modes/*.yaml`), not by the defaults here.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

ImageExtension = Literal[".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif"]
IMAGE_EXTENSIONS: tuple[str, ...] = get_args(ImageExtension)


class Operational:
    """Marks a key that changes how a run works but not what it computes: it stays out of the run's fingerprint."""


def _resolve_path(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, str | Path) or not str(value):
        raise PydanticCustomError("path", "not a path")
    base: Path = (info.context or {}).get("base", Path.cwd())
    try:
        return (base / Path(value).expanduser()).resolve()
    except (RuntimeError, ValueError, OSError) as error:  # `~nobody`, a NUL
        raise PydanticCustomError("path", "not a path") from error


def _with_dot(value: Any) -> Any:
    return f".{value.lower().lstrip('.')}" if isinstance(value, str) else value


ConfigPath = Annotated[Path, Strict(False), BeforeValidator(_resolve_path)]
Probability = Annotated[float, Field(ge=0, le=1)]
ThreeFloats = Annotated[tuple[float, float, float], Strict(False)]


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


def _unread_off(value: Any) -> Any:
    """YAML reads `off` as false."""
    return "off" if value is False else value


def _refuse(contradictions: dict[str, str]) -> None:
    """An error between keys, if there are any: key -> what it may be; `load` tells each."""
    if contradictions:
        raise PydanticCustomError("contradiction", "contradiction", {"allowed": contradictions})


class ProjectConfig(Section):
    name: Annotated[str, Field(min_length=1), Operational()] = "doccls"
    """Name of the project; the W&B project unless tracking.project says otherwise."""
    version: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$"), Operational()] = "v001"
    """Prefix of the run id: `v087` gives run ids such as `v087-8c206e`."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 42
    """Seed of folds, initial weights, order, augmentation and dropout."""


class DataConfig(Section):
    train_csv: ConfigPath
    """CSV of the training images: one row an image, with the ID and target columns."""
    image_dir_train: ConfigPath
    """Folder of the training images."""
    sample_csv: ConfigPath | None = None
    """Sample submission: its columns, IDs and order are those of the submission that `doccls predict` writes."""
    image_dir_test: ConfigPath | None = None
    """Folder of the test images, for `doccls predict`."""
    image_ext: Annotated[ImageExtension, BeforeValidator(_with_dot)] = ".jpg"
    """Extension tried first for an ID that has none."""
    id_col: Annotated[str, Field(min_length=1)] = "ID"
    """Column of the image IDs, with or without extension."""
    target_col: Annotated[str, Field(min_length=1)] = "target"
    """Column of the labels: numbers or names."""
    group_col: Annotated[str, Field(min_length=1)] | None = None
    """Column that says which rows belong together (pages of one document): a group never spans two folds."""
    folds: Annotated[int, Field(ge=2)] = 5
    """Number of folds. A column `fold` in the CSV, where there is one, decides which row is in which."""
    valid_fold: Annotated[int, Field(ge=0)] | Literal["all"] = "all"
    """The fold to train (it is the one validated on), or `all`: every fold, and then the merged OOF files."""
    stratify: bool = True
    """Give every fold the same share of each class."""
    on_duplicate: Literal["keep", "error"] = "keep"
    """Rows that name the same image: `keep` them all, in one fold, with a warning; or `error`."""
    on_bad_image: Literal["error", "skip"] = "error"
    """Missing, truncated or non-image files: `error` names them all before training; `skip` leaves those rows out."""
    max_image_pixels: Annotated[int, Field(ge=1)] = 100_000_000
    """Largest width x height accepted: a guard against decompression bombs."""
    store: Annotated[
        Literal["auto", "off"] | ConfigPath,
        Field(union_mode="left_to_right"),
        BeforeValidator(_unread_off),
        Operational(),
    ] = "auto"
    """Folder of decoded pages, for all runs; `auto`: page_store beside output.exp_dir; `off`: decode in each epoch."""
    num_workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Processes that load images, for each training process; 0: it does so itself; `auto`: as many as pay."""

    @model_validator(mode="after")
    def _fold_exists(self) -> Self:
        if self.valid_fold != "all" and self.valid_fold >= self.folds:
            _refuse({"valid_fold": f"'all' or 0 to {self.folds - 1}, since data.folds is {self.folds}"})
        return self

    def list_wanted(self) -> list[int]:
        """The folds to train."""
        return list(range(self.folds)) if self.valid_fold == "all" else [self.valid_fold]


class ModelConfig(Section):
    name: Annotated[str, Field(min_length=1)] = "tf_efficientnet_b3"
    """Any timm model name."""
    pretrained: bool = True
    """Start from timm's pretrained weights, fetched from the hub (see model.weights for machines without network)."""
    weights: Annotated[ConfigPath | None, Operational()] = None
    """Start from this file (.safetensors, .pth) instead of the hub. Loaded without running any code in it."""
    pooling: str | None = None
    """Global pooling before the classifier (avg, max, avgmax, gem, ...); null keeps the architecture's own."""
    drop_rate: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Dropout before the classifier; null keeps the architecture's own."""
    drop_path_rate: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Stochastic depth; null keeps the architecture's own."""
    mean: ThreeFloats | None = None
    """RGB mean of the normalisation, 0 to 1; null takes the one the model was pretrained with."""
    std: ThreeFloats | None = None
    """RGB standard deviation of the normalisation; null takes the one the model was pretrained with."""

    @model_validator(mode="after")
    def _std_positive(self) -> Self:
        if self.std is not None and min(self.std) <= 0:
            _refuse({"std": "three numbers above 0"})
        return self


class TrainConfig(Section):
    img_size: Annotated[int, Field(ge=32, le=4096)] = 224
    """Side of the square the page is fitted into (longest side scaled, the rest white), in pixels."""
    page_px: Annotated[int, Field(ge=32, le=8192)] | None = None
    """Longest side of the pages that are kept and augmented; null: 5/4 of img_size if they are turned or zoomed."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Images in one optimizer step, over all processes together."""
    micro_batch_size: Annotated[Annotated[int, Field(ge=1)] | None, Operational()] = None
    """Most images one process holds at a time; smaller than its share of batch_size means gradient accumulation."""
    epochs: Annotated[int, Field(ge=1)] = 10
    """Passes over the training folds."""
    lr: Annotated[float, Field(gt=0)] = 3e-4
    """Peak learning rate."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """`linear` or `sqrt`: lr and min_lr are those of a batch of 32 images, and grow with batch_size or its root."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Weight decay; biases and norms are left out of it."""
    optimizer: Annotated[str, Field(min_length=1)] = "adamw"
    """Any timm optimizer name (adam, adamw, sgd, lamb, ...), in any case."""
    scheduler: Literal["cosine", "tanh", "poly", "step", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Epochs of linear warm-up, counted within epochs."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Where cosine, tanh and poly end; a warm-up starts at it or at a thousandth of lr, whichever is more."""
    decay_epochs: Annotated[float, Field(gt=0)] = 10.0
    """Scheduler `step`: epochs between two decays."""
    decay_rate: Annotated[float, Field(gt=0)] = 0.1
    """Scheduler `step`: factor of one decay; `poly`: the power."""
    amp: bool | Literal["fp16", "bf16"] = True
    """Mixed precision: true takes what the device does best (bf16, else fp16; none on a CPU)."""
    grad_clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest gradient norm; null does not clip."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target spread over all classes."""
    mixup_alpha: Annotated[float, Field(ge=0)] = 0.0
    """Mixup strength; 0 is off."""
    cutmix_alpha: Annotated[float, Field(ge=0)] = 0.0
    """CutMix strength; 0 is off. With both on, each batch takes one of them."""
    mix_prob: Probability = 1.0
    """Share of the batches that Mixup or CutMix touches."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | Literal["auto"] | None = None
    """Decay of a moving average of the weights, which is validated too; `auto`: over 5 % of the steps; null is off."""
    sync_bn: bool = False
    """BatchNorm over the images of all processes (SyncBatchNorm), for few images on each of several GPUs."""
    speed: Literal["reproducible", "fast"] = "reproducible"
    """`fast`, on GPUs: compiled model, fastest kernels, TF32 even without amp. No two runs agree in all bits."""
    compile: bool | None = None
    """torch.compile the model; null: on GPUs, if speed is `fast`."""
    deterministic: bool | None = None
    """Only kernels that give the same bits each time; null: unless speed is `fast`."""
    cpu_threads: Annotated[int, Field(ge=1)] = 2
    """Threads that one process computes with. Fixed, not found: on a CPU the count changes the order of sums."""
    num_processes: Annotated[Annotated[int, Field(ge=1)] | None, Operational()] = None
    """Processes the run expects; null takes what was started. A launch that starts another number is refused."""
    checkpoint_interval_s: Annotated[float, Field(gt=0), Operational()] = 300.0
    """Seconds of training between two resume checkpoints of a fold; a stop saves one too."""
    sigusr2: Annotated[Literal["stacks", "stop"], Operational()] = "stacks"
    """What SIGUSR2 does: write each thread's stack, or stop as SIGTERM does (SGE and LSF send it ahead of a limit)."""
    collective_timeout_s: Annotated[float, Field(ge=1), Operational()] = 600.0
    """Seconds that one of several processes may train or validate without a step before the run ends as hung."""
    stop_timeout_s: Annotated[float, Field(ge=1), Operational()] = 110.0
    """Seconds that a stop may take, with the write of the state, before it is cut off; Slurm warns 120 s ahead."""
    log_interval: Annotated[int, Field(ge=1), Operational()] = 10
    """Optimizer steps between two step lines in the log."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        contradictions = {}
        if self.warmup_epochs >= self.epochs:
            contradictions["warmup_epochs"] = f"less than train.epochs, which is {self.epochs}"
        if self.min_lr > self.lr:
            contradictions["min_lr"] = f"at most train.lr, which is {self.lr}"
        if self.page_px is not None and self.page_px < self.img_size:
            contradictions["page_px"] = f"at least train.img_size, which is {self.img_size}"
        if self.num_processes is not None and self.num_processes > self.batch_size:
            contradictions["num_processes"] = f"at most train.batch_size, which is {self.batch_size}"
        _refuse(contradictions)
        return self

    @property
    def is_deterministic(self) -> bool:
        """Whether only kernels are allowed that give the same bits each time."""
        return self.speed == "reproducible" if self.deterministic is None else self.deterministic


class AugmentConfig(Section):
    """Training augmentation, applied to the padded page. Every `_prob` is the share of pages that it touches."""

    rotate_deg: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Turn by any angle up to this, either way."""
    rotate_prob: Probability = 1.0
    """Share of the pages turned by rotate_deg."""
    quarter_turn_prob: Probability = 0.0
    """Turn by a multiple of 90 degrees."""
    hflip_prob: Probability = 0.0
    """Mirror left and right."""
    vflip_prob: Probability = 0.0
    """Mirror up and down."""
    scale: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Zoom in or out by up to this share."""
    shift: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Move by up to this share of the side."""
    perspective_prob: Probability = 0.0
    """Photograph at an angle."""
    blur_prob: Probability = 0.0
    """Blur of motion, focus or a soft lens."""
    noise_prob: Probability = 0.0
    """Sensor noise."""
    shadow_prob: Probability = 0.0
    """A soft shadow over part of the page."""
    jpeg_prob: Probability = 0.0
    """Strong JPEG compression."""
    brightness: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Contrast by up to this share, either way; darker by up to it, and a little brighter."""


class TrackingConfig(Section):
    wandb: bool = False
    """Log to Weights & Biases: one group a run, one W&B run a fold. Without key or network it logs offline."""
    project: Annotated[str, Field(min_length=1)] | None = None
    """W&B project; null takes project.name."""
    entity: Annotated[str, Field(min_length=1)] | None = None
    """W&B user or team; null takes the account's default."""


class OutputConfig(Section):
    logs_dir: Annotated[ConfigPath, Field(validate_default=True)] = Path("logs")
    """Folder of the log files."""
    exp_dir: Annotated[ConfigPath, Field(validate_default=True)] = Path("experiments")
    """Folder of the runs: each in <exp_dir>/YYYYMMDD/<run_id>/."""
    snapshots: bool = True
    """Write the resolved config.yaml, with versions, commit, command and digests, into the run."""


class Config(Section):
    """The whole of what a run is told."""

    mode: Annotated[Literal["basic", "highperf"], Operational()] = "basic"
    """Named set of defaults; the flag --mode wins over this key."""
    project: ProjectConfig = ProjectConfig()
    data: Annotated[DataConfig, Operational()]
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    augment: AugmentConfig = AugmentConfig()
    tracking: Annotated[TrackingConfig, Operational()] = TrackingConfig()
    output: Annotated[OutputConfig, Operational()] = Field(default_factory=OutputConfig)
    provenance: Annotated[dict[str, Any] | None, Operational()] = None
    """Written into snapshots (versions, commit, command, digests, class order); read by people, ignored by doccls."""

    @property
    def page_px(self) -> int:
        """Longest side of the pages as they are kept: more than `img_size` where turning or zooming would blur them."""
        if self.train.page_px is not None:
            return self.train.page_px
        size_px, augment = self.train.img_size, self.augment
        moved = augment.rotate_deg > 0 or augment.scale > 0
        return size_px + -(-size_px // 4) if moved else size_px


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}
