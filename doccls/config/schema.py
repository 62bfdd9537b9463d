"""Every config key: its type, limits, default and description.

The string under a field becomes its description in the JSON schema and in docs/config.md.
Recipes (model, augmentation, schedule) are set by the modes (`modes/*.yaml`), not by the defaults here.
"""

import os
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

from doccls.config.local_model import PREFIX
from doccls.config.paths import PathError, resolve_path

ImageExtension = Literal[
    ".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".jpe", ".jfif", ".jp2", ".j2k", ".jpf", ".jpx",
    ".avif", ".heic", ".heif", ".hif", ".ppm", ".pgm", ".pbm", ".pnm",
]  # fmt: skip
IMAGE_EXTENSIONS: tuple[str, ...] = get_args(ImageExtension)


# What databases, spreadsheets (in several languages), C, Java, Python and R write where there is no value.
MISSING_LABELS = (
    "", "nan", "-nan", "+nan", "nan(*)", "-nan(*)", "1.#*", "-1.#*", "+1.#*", "1,#*", "-1,#*", "nat", "none", "null",
    "(null)", "[null]", "<null>", "\\n", "na", "n/a", "<na>", "#n/*", "#na", "#nv", "#i/t", "#н/д", "#yok", "#*!",
    "#*?", "#ref", "#value", "#div/0", "#name", "#num", "#null", "#wert", "#bezug", "#getting_data", "##*", "err:*",
    "error 20*",
)  # fmt: skip


DAMAGE_VERSION = 1
"""Version of the damage to pages, a part of the fingerprint: raise it with every change of the damaged pixels."""


class Operational:
    """A mark for keys that change how a run executes but not what it computes; the fingerprint excludes them."""


def _resolve_path(value: Any, info: ValidationInfo, is_output: bool = False) -> Any:
    """Make a path absolute; variables are only expanded in the keys of `context["expanded"]`, as users write them."""
    if not isinstance(value, str | Path) or not str(value):
        raise PydanticCustomError("path", "not a path")
    context = info.context or {}
    variables = os.environ if info.field_name in context.get("expanded", ()) else None
    try:
        return resolve_path(str(value), context.get("base"), variables, follows_broken_links=is_output)
    except PathError as error:
        raise PydanticCustomError("path", "not a path", {"reason": str(error)}) from error


def _resolve_output(value: Any, info: ValidationInfo) -> Any:
    return _resolve_path(value, info, is_output=True)


def _resolve_local_model(value: Any, info: ValidationInfo) -> Any:
    """Make the path in `local-dir:PATH` absolute: like other paths, it is relative to the config file."""
    if not isinstance(value, str) or not value.startswith(PREFIX):
        return value
    return f"{PREFIX}{_resolve_path(value.removeprefix(PREFIX), info)}"


def _with_dot(value: Any) -> Any:
    return f".{value.lower().lstrip('.')}" if isinstance(value, str) else value


ConfigPath = Annotated[Path, Strict(False), BeforeValidator(_resolve_path)]
OutputFolder = Annotated[Path, Strict(False), BeforeValidator(_resolve_output)]
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


def _restore_off(value: Any) -> Any:
    """Return "off" for false, which is how YAML reads `off`."""
    return "off" if value is False else value


def _refuse(contradictions: dict[str, str]) -> None:
    """Raise one error for all contradictions (key -> allowed values), if there are any; `load` reports each."""
    if contradictions:
        raise PydanticCustomError("contradiction", "contradiction", {"allowed": contradictions})


class ProjectConfig(Section):
    name: Annotated[str, Field(min_length=1), Operational()] = "doccls"
    """Project name; also the W&B project, unless tracking.project is set."""
    version: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$"), Operational()] = "v001"
    """Prefix of the run id: `v087` gives run ids such as `v087-8c206e`."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 42
    """Seed of the folds (see data.fold_seed), initial weights, sample order, augmentation and dropout."""


class DataConfig(Section):
    train_csv: ConfigPath
    """CSV of the training images: one row per image, with the ID and target columns."""
    image_dir_train: ConfigPath
    """Folder of the training images."""
    sample_csv: ConfigPath | None = None
    """Sample submission; `doccls predict` writes a submission with the same columns, IDs and order."""
    image_dir_test: ConfigPath | None = None
    """Folder of the test images, for `doccls predict`."""
    image_ext: Annotated[ImageExtension, BeforeValidator(_with_dot)] = ".jpg"
    """Extension to try first for IDs without one."""
    id_col: Annotated[str, Field(min_length=1)] = "ID"
    """Column of the image IDs, with or without file extension."""
    target_col: Annotated[str, Field(min_length=1)] = "target"
    """Column of the labels (numbers or names)."""
    group_col: Annotated[str, Field(min_length=1)] | None = None
    """Column of the group of each row (such as its document): a group never spans two folds."""
    folds: Annotated[int, Field(ge=2)] = 5
    """Number of folds. If the CSV has a column `fold`, it assigns the rows to the folds."""
    valid_fold: Annotated[int, Field(ge=0)] | Literal["all"] = "all"
    """The fold to validate on while training on the others; `all` trains every fold and merges the OOF files. With a
    single fold no training merges, array tasks included: `doccls-launch merge` does."""
    stratify: bool = True
    """Keep the class proportions equal across folds."""
    fold_seed: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = None
    """Seed of the folds; null: project.seed. Runs on the same folds can be blended. A column `fold` needs no seed."""
    missing_labels: Annotated[tuple[str, ...], Strict(False)] = MISSING_LABELS
    """Labels that count as missing, an error, in any case; `*`: any text. Without `none`, a class may be named so."""
    on_duplicate: Literal["keep", "error", "allow"] = "keep"
    """Duplicate images: `keep` all rows in one fold and warn; `error`; `allow` the `fold` column to split them."""
    on_bad_image: Literal["error", "skip"] = "error"
    """Missing, truncated or non-image files: `error` lists all of them before training; `skip` drops their rows."""
    max_image_pixels: Annotated[int, Field(ge=1)] = 100_000_000
    """Maximum width x height of an image, as a guard against decompression bombs."""
    store: Annotated[
        Literal["auto", "off"] | OutputFolder,
        Field(union_mode="left_to_right"),
        BeforeValidator(_restore_off),
        Operational(),
    ] = "auto"
    """Folder of decoded pages, shared by runs; `auto`: page_store beside output.exp_dir; `off`: decode every epoch."""
    num_workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Data-loading workers per training process; 0 loads in the training process; `auto`: as many as are useful."""

    @model_validator(mode="after")
    def _check_valid_fold(self) -> Self:
        if self.valid_fold != "all" and self.valid_fold >= self.folds:
            _refuse({"valid_fold": f"'all' or 0 to {self.folds - 1}, since data.folds is {self.folds}"})
        return self

    def list_wanted(self) -> list[int]:
        """Return the folds to train."""
        return list(range(self.folds)) if self.valid_fold == "all" else [self.valid_fold]


class ModelConfig(Section):
    name: Annotated[str, Field(min_length=1), BeforeValidator(_resolve_local_model)] = "tf_efficientnet_b3"
    """Any timm model name, also a former one; `hf-hub:OWNER/NAME`; or `local-dir:FOLDER` (config.json, weights)."""
    pretrained: bool = True
    """Start from timm's pretrained weights, downloaded from the hub (without network access, use model.weights)."""
    weights: Annotated[ConfigPath | None, Operational()] = None
    """Start from this file (.safetensors, .pth) instead of the hub. Loading it never runs code from it."""
    pooling: str | None = None
    """Global pooling before the classifier (avg, max, avgmax, gem, ...); null: the architecture's default."""
    drop_rate: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Dropout rate before the classifier; null: the architecture's default."""
    drop_path_rate: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Stochastic depth rate; null: the architecture's default."""
    mean: ThreeFloats | None = None
    """RGB mean for input normalization, 0 to 1; null: the mean that the model was pretrained with."""
    std: ThreeFloats | None = None
    """RGB standard deviation for input normalization; null: the one that the model was pretrained with."""

    @model_validator(mode="after")
    def _check_std(self) -> Self:
        if self.std is not None and min(self.std) <= 0:
            _refuse({"std": "three numbers above 0"})
        return self


class TrainConfig(Section):
    img_size: Annotated[int, Field(ge=32, le=4096)] = 224
    """Side of the square model input in pixels; pages are scaled to fit and padded with white."""
    page_px: Annotated[int, Field(ge=32, le=8192)] | None = None
    """Longest side of decoded pages, before augmentation; null: img_size, or 5/4 of it with rotation or zoom."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Images per optimizer step, over all processes."""
    micro_batch_size: Annotated[Annotated[int, Field(ge=1)] | None, Operational()] = None
    """Maximum images per forward pass of a process; if its part of batch_size is larger, gradients are accumulated."""
    epochs: Annotated[int, Field(ge=1)] = 10
    """Number of passes over the training folds."""
    lr: Annotated[float, Field(gt=0)] = 3e-4
    """Peak learning rate."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """`linear`, `sqrt`: lr and min_lr are for a batch of 32, and are scaled by batch_size / 32 or its square root."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Weight decay; not applied to biases and normalization layers."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rate from each layer to the one before it (0.7 to 0.9 for transformers); 1: off."""
    optimizer: Annotated[str, Field(min_length=1)] = "adamw"
    """Any timm optimizer name (adam, adamw, sgd, lamb, ...), case-insensitive."""
    scheduler: Literal["cosine", "tanh", "poly", "step", "constant"] = "cosine"
    """Learning rate schedule after the warm-up."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Epochs of linear warm-up, included in epochs."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Final learning rate of cosine, tanh and poly; the warm-up starts at the larger of min_lr and lr / 1000."""
    decay_epochs: Annotated[float, Field(gt=0)] = 10.0
    """Scheduler `step`: epochs between decays."""
    decay_rate: Annotated[float, Field(gt=0)] = 0.1
    """Scheduler `step`: factor of each decay; `poly`: the power."""
    amp: bool | Literal["fp16", "bf16"] = True
    """Mixed precision; true: as `accelerate launch` sets it, else the device's best (bf16, else fp16; CPU: none)."""
    grad_clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Maximum gradient norm; null: no clipping."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing: the part of the target spread evenly over all classes."""
    mixup_alpha: Annotated[float, Field(ge=0)] = 0.0
    """Mixup alpha; 0: off."""
    cutmix_alpha: Annotated[float, Field(ge=0)] = 0.0
    """CutMix alpha; 0: off. If both are on, each batch uses one of them."""
    mix_prob: Probability = 1.0
    """Probability of applying Mixup or CutMix to a batch."""
    unmixed_epochs: Annotated[int, Field(ge=0)] = 0
    """Final epochs without Mixup and CutMix; a run of no more epochs than this is not mixed at all."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | Literal["auto"] | None = None
    """Decay of the EMA of the weights, which is validated too; `auto`: it spans 5 % of the steps; null: off."""
    sync_bn: bool = False
    """SyncBatchNorm: normalize over the images of all processes; for small batches per GPU."""
    speed: Literal["reproducible", "fast"] = "reproducible"
    """`fast`, on GPUs: compiled model, fastest kernels, TF32 even without amp. Runs are not bit-identical."""
    compile: bool | None = None
    """Compile the model with torch.compile; null: on GPUs if speed is `fast`."""
    deterministic: bool | None = None
    """Use only deterministic kernels; null: unless speed is `fast`."""
    cpu_threads: Annotated[int, Field(ge=1)] = 2
    """CPU threads per process. Fixed, not detected, since on a CPU the count changes the order of sums."""
    num_processes: Annotated[Annotated[int, Field(ge=1)] | None, Operational()] = None
    """Number of processes to require; null: any. A launch with a different number is rejected."""
    checkpoint_interval_s: Annotated[float, Field(gt=0), Operational()] = 300.0
    """Seconds of training between resume checkpoints of a fold; stopping a run saves one too."""
    sigusr2: Annotated[Literal["stacks", "stop"], Operational()] = "stacks"
    """Action on SIGUSR2: dump all thread stacks, or stop like SIGTERM (SGE and LSF send it before a time limit)."""
    collective_timeout_s: Annotated[float, Field(ge=1), Operational()] = 600.0
    """Seconds without a training or validation step after which a run of several processes is ended as hung."""
    stop_timeout_s: Annotated[float, Field(ge=1), Operational()] = 110.0
    """Seconds that stopping may take, including saving, before the process exits; Slurm warns 120 s ahead."""
    log_interval: Annotated[int, Field(ge=1), Operational()] = 10
    """Optimizer steps between step lines in the log."""

    @model_validator(mode="after")
    def _check_contradictions(self) -> Self:
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
    def has_mixing(self) -> bool:
        """Whether Mixup or CutMix is on."""
        has_alpha = self.mixup_alpha > 0 or self.cutmix_alpha > 0
        return has_alpha and self.mix_prob > 0 and self.unmixed_epochs < self.epochs

    @property
    def is_deterministic(self) -> bool:
        """Whether only deterministic kernels are allowed."""
        return self.speed == "reproducible" if self.deterministic is None else self.deterministic


class ValidConfig(Section):
    damage: Literal["none", "light", "scan"] = "none"
    """Also validate on copies of the pages with the damage of phones and scanners; the level is its strength."""
    select: Literal["clean", "damaged"] | None = None
    """The score that selects the best epoch; null: `damaged` if there are damaged copies, else `clean`."""

    @model_validator(mode="after")
    def _check_select(self) -> Self:
        if self.select == "damaged" and self.damage == "none":
            _refuse({"select": "clean or null, since valid.damage is none"})
        return self

    @property
    def has_damage(self) -> bool:
        """Whether each validation also scores damaged copies of the pages."""
        return self.damage != "none"

    @property
    def selects_damaged(self) -> bool:
        """Whether epochs are compared by their score on the damaged copies."""
        return self.has_damage and self.select != "clean"


class AugmentConfig(Section):
    """Training augmentation. Every `_prob` is the probability per page."""

    strength: Probability = 1.0
    """Factor for the whole recipe: how many pages each transform changes, and by how much."""
    damage_prob: Probability = 0.0
    """Probability that a page is damaged like a scan or photo (docs/accuracy.md), instead of what the keys below do."""
    rotate_deg: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Maximum rotation angle in degrees, in either direction."""
    rotate_prob: Probability = 1.0
    """Probability of a rotation by up to rotate_deg."""
    quarter_turn_prob: Probability = 0.0
    """Probability of a rotation by a multiple of 90 degrees."""
    hflip_prob: Probability = 0.0
    """Probability of a horizontal flip."""
    vflip_prob: Probability = 0.0
    """Probability of a vertical flip."""
    scale: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Maximum zoom in or out, as a fraction."""
    shift: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Maximum shift, as a fraction of the side."""
    perspective_prob: Probability = 0.0
    """Probability of a perspective warp."""
    blur_prob: Probability = 0.0
    """Probability of blur: out of focus, moved, or of a lower resolution."""
    noise_prob: Probability = 0.0
    """Probability of sensor noise."""
    shadow_prob: Probability = 0.0
    """Probability of uneven light or a soft shadow."""
    jpeg_prob: Probability = 0.0
    """Probability of strong JPEG compression."""
    brightness: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Maximum change of contrast and of brightness (darkening more than brightening), as a fraction."""

    def scale_by_strength(self) -> Self:
        """Return the recipe with every key multiplied by the strength, and a strength of 1."""
        scaled = {key: value * self.strength for key, value in self if key != "strength"}
        return type(self)(**scaled)


class TrackingConfig(Section):
    wandb: bool = False
    """Log to Weights & Biases: one group per run, one W&B run per fold; offline without an API key or network."""
    project: Annotated[str, Field(min_length=1)] | None = None
    """W&B project; null: project.name."""
    entity: Annotated[str, Field(min_length=1)] | None = None
    """W&B user or team; null: the account's default."""


class OutputConfig(Section):
    logs_dir: Annotated[OutputFolder, Field(validate_default=True)] = Path("logs")
    """Folder of the log files."""
    exp_dir: Annotated[OutputFolder, Field(validate_default=True)] = Path("experiments")
    """Folder of the runs; each is in <exp_dir>/YYYYMMDD/<run_id>/."""
    snapshots: bool = True
    """Write config.yaml, the resolved config with versions, commit, command and digests, into the run's folder."""
    report: bool = True
    """Write report.html, one page with all results, into the run's folder at its end (see `doccls report`)."""


class Config(Section):
    """The config of a run."""

    mode: Annotated[Literal["basic", "highperf"], Operational()] = "basic"
    """Named set of defaults; --mode overrides this key."""
    project: ProjectConfig = ProjectConfig()
    data: Annotated[DataConfig, Operational()]
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    valid: ValidConfig = ValidConfig()
    augment: AugmentConfig = AugmentConfig()
    tracking: Annotated[TrackingConfig, Operational()] = TrackingConfig()
    output: Annotated[OutputConfig, Operational()] = Field(default_factory=OutputConfig)
    provenance: Annotated[dict[str, Any] | None, Operational()] = None
    """Written into snapshots (versions, commit, command, digests, class order) for information; ignored when read."""

    @property
    def damage_version(self) -> int | None:
        """The version of the damage to validation pages and of the defects of training pages; None without any."""
        augment = self.augment
        defects = (augment.damage_prob, augment.blur_prob, augment.noise_prob, augment.shadow_prob, augment.jpeg_prob)
        return DAMAGE_VERSION if self.valid.has_damage or max(defects) > 0 else None

    @property
    def page_px(self) -> int:
        """The longest side of decoded pages: above `img_size` if rotation or zoom would blur them otherwise."""
        if self.train.page_px is not None:
            return self.train.page_px
        size_px, augment = self.train.img_size, self.augment
        is_rotated = (augment.rotate_deg > 0 and augment.rotate_prob > 0) or augment.damage_prob > 0
        is_resampled = (is_rotated or augment.scale > 0) and augment.strength > 0
        return size_px + -(-size_px // 4) if is_resampled else size_px


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}
