"""--after: a further request, where earlier prompts stand before every query already."""

import dataclasses
import random
from dataclasses import dataclass, field

import torch

from eval import load_prompts
from data import Template, read_rows
from support.checks import check_generic
from support.hardware import read_config
from support.rows import check_disjoint
from support.templates import template_from_json


@dataclass
class Earlier:
    """What stands before the new prompt; empty where nothing does."""

    phi: torch.Tensor = None  # (q, d)
    info: dict = field(default_factory=dict)  # the spul.json of earlier prompts, as one
    rows: list = field(default_factory=list)  # that they make the model forget, of --after-forget

    @property
    def q(self):
        return 0 if self.phi is None else len(self.phi)

    @property
    def template(self):
        return template_from_json(self.info["template"] or "{text}") if self.info else None

    @property
    def generic(self):
        return self.info.get("generic", [])

    def to(self, device):
        return self if self.phi is None else dataclasses.replace(self, phi=self.phi.to(device))

    def kept(self, seed):
        """The rows, with one of the generic answers each: to the new prompt they are to retain."""
        rng = random.Random(f"earlier {seed}")
        return [dataclasses.replace(row, label=rng.choice(self.generic)) for row in self.rows]


def read_earlier(args, splits):
    """The prompts of --after and the rows of --after-forget -> Earlier.

    Raises ValueError or OSError where they do not go with the model or with the other rows.
    """
    if not args.after:
        if args.after_forget:
            raise ValueError("--after-forget: rows that the prompts of --after made it forget")
        return Earlier()
    retain = splits.get("train retain", [])
    if not retain or any(row.label is None for row in retain):
        raise ValueError("--after: --retain FILE with labels is needed")
    phi, info = load_prompts(args.after, read_config(args.model), args.model)
    rows = read_rows(args.after_forget) if args.after_forget else []
    check_disjoint(rows, retain)
    check_generic(rows, info["generic"])
    return Earlier(phi, info, rows)


def check_template(earlier, template: Template):
    """Refuses a template that is not that of the earlier prompts."""
    if earlier.template and earlier.template.string != template.string:
        raise ValueError("--template: another than the earlier prompts': a query has only one")
