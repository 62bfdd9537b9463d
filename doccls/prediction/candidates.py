"""What `--views` and `--adapt-bn` ask for: one setting, or several of which the OOF predictions choose one."""

from dataclasses import dataclass

from doccls.data.views import CANDIDATES, IDENTITY, View, parse_views
from doccls.errors import UserError
from doccls.oof.views import Setting

PRIORS = (64, 256)  # the prior strengths that `auto` tries


@dataclass(frozen=True)
class Candidates:
    """The settings to choose from."""

    views: tuple[View, ...]
    priors: tuple[int | None, ...]  # as in Setting; the first one is that of the plain setting
    keeps_views: bool  # whether all views are averaged anyway

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the views."""
        return tuple(view.name for view in self.views)

    @property
    def computed(self) -> tuple[View, ...]:
        """The views whose logits are computed: first the page itself, by which they are checked."""
        return (IDENTITY, *(view for view in self.views if view != IDENTITY))

    @property
    def is_single(self) -> bool:
        """Whether there is nothing to choose."""
        return self.keeps_views and len(self.priors) == 1

    @property
    def plain(self) -> Setting:
        """The setting that is used if nothing else gains."""
        return Setting(self.names if self.keeps_views else (IDENTITY.name,), self.priors[0])

    @property
    def options(self) -> str:
        """The options that ask for the choice, for messages."""
        views = "" if self.keeps_views else "--views auto"
        return " ".join(filter(None, (views, "--adapt-bn auto" if len(self.priors) > 1 else "")))


def parse_candidates(views: str, adapt_bn: str) -> Candidates:
    """Return the candidates of the values of --views and --adapt-bn.

    Raises:
        UserError: a view is unknown, or the prior strength is no number.
    """
    priors: tuple[int | None, ...]
    if adapt_bn == "off":
        priors = (None,)
    elif adapt_bn == "auto":
        priors = (None, *PRIORS)
    elif adapt_bn.isascii() and adapt_bn.isdigit():
        priors = (int(adapt_bn),)
    else:
        raise UserError(
            f"--adapt-bn: {adapt_bn!r} is not allowed: auto, off, or the strength of the training's BatchNorm "
            "statistics in pages, a whole number such as 256 (0 uses only those of the pages)"
        )
    if views == "auto":
        return Candidates(CANDIDATES, priors, keeps_views=False)
    return Candidates((IDENTITY,) if views == "none" else parse_views(views), priors, keeps_views=True)
