"""Choose sites by patterns over their dotted names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from fnmatch import fnmatchcase

from vbp.errors import InputError, some_of
from vbp.sites.site import Site


def select_sites(sites: Sequence[Site], include: Sequence[str] = (), exclude: Sequence[str] = ()) -> tuple[Site, ...]:
    """Return the sites whose name matches a pattern of `include` (all, if there is none) and none of `exclude`.

    In a pattern `*` stands for any text, dots too, `?` for one character, `[0-3]` for one of several.

    Raises:
        InputError: A pattern matches no site, no site is left, or one attention is left in parts.

    Example:
        >>> from vbp.sites.selection import select_sites
        >>> [site.name for site in select_sites(sites, exclude=["blocks.0.*"])]
        ['blocks.1.mlp.fc1']
    """
    for flag, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(site.name, pattern) for site in sites):
                raise InputError(
                    f"{flag} must match the name of a site, got {pattern!r}; the sites are "
                    f"{some_of([site.name for site in sites])} (vbp inspect lists them)"
                )

    def matches(site: Site, patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(site.name, pattern) for pattern in patterns)

    chosen = tuple(site for site in sites if (not include or matches(site, include)) and not matches(site, exclude))
    if not chosen:
        raise InputError(
            f"include and exclude must leave a site, got {' '.join(include) or 'all'} without {' '.join(exclude)}; "
            "exclude less"
        )
    _check_whole(sites, chosen)
    return chosen


def _check_whole(sites: Sequence[Site], chosen: Sequence[Site]) -> None:
    """Refuse a part of the sites of one attention, whose heads have one width, or of the sites of one layer."""
    together: dict[str, list[Site]] = defaultdict(list)
    for site in sites:
        for name in site.producers:
            together[name if site.kind == "mlp" else f"{name.rpartition('.')[0]}.*"].append(site)
    for group in together.values():
        kept = [site for site in group if site in chosen]
        if kept and len(kept) < len(group):
            left = next(site for site in group if site not in chosen)
            raise InputError(
                f"include and exclude must take all sites of one attention or layer, or none, got {kept[0].name} "
                f"without {left.name}; name both"
            )
