"""The names that a config takes from timm, checked before any data is read."""

from doccls.config.schema import Config
from doccls.model.build import check_model_name
from doccls.model.optim import check_optimizer_name


def check_names(config: Config) -> None:
    """The model and the optimizer are known to timm.

    Raises:
        UserError: one is not; the nearest known ones are named.
    """
    check_model_name(config.model.name)
    check_optimizer_name(config.train.optimizer)
