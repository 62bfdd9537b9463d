"""The check of timm names in a config, which runs before any data is read."""

from doccls.config.schema import Config
from doccls.model.optim import check_optimizer_name
from doccls.model.source import check_model_name


def check_names(config: Config) -> None:
    """Check that timm knows the model and the optimizer.

    Raises:
        UserError: it does not; the message lists the closest names.
    """
    check_model_name(config.model.name)
    check_optimizer_name(config.train.optimizer)
