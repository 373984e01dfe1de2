"""A token-classification model of the site's own finds personal details, beside the rules.

`prepare.deidentify.model` in site.toml is a folder with config.json, a fast tokenizer
(tokenizer.json) and weights as safetensors. It is read from the disk alone; no code of the folder
runs. The model's labels become our kinds by `KIND_OF_LABEL`; labels that are not in it are not
looked for. How much a model finds depends on the texts it was trained on: measure it on your own.

Presidio has a recogniser of its own for this; it returns nothing for a text that the model fails
on and cuts texts at the model's length without a word, so this one replaces it.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from presidio_analyzer import LocalRecognizer, RecognizerResult
from torch import Tensor
from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from silotune.client.preparation.recognisers import LANGUAGE
from silotune.common.errors import ErrorCode, UsageError

_LABELS = {  # kind → what models call it (CoNLL, OntoNotes, i2b2/n2c2 and frequent spellings)
    "person": "PER PERSON PERS PS NAME PATIENT DOCTOR STAFF HCW NAME_PATIENT NAME_DOCTOR FIRSTNAME "
    "LASTNAME GIVENNAME SURNAME MIDDLENAME USERNAME",
    "address": "LOC LOCATION GPE LC ADDRESS STREET CITY STATE ZIP ZIPCODE POSTCODE LOCATION_OTHER "
    "BUILDINGNUM BUILDINGNUMBER SECONDARYADDRESS",
    "date": "DATE DAT DT DATE_TIME DATEOFBIRTH DOB",
    "phone": "PHONE PHONENUMBER PHONEIMEI TELEPHONENUM TELEPHONE FAX CONTACT",
    "email": "EMAIL EMAIL_ADDRESS",
    "record_number": "ID IDNUM MEDICALRECORD HEALTHPLAN MRN",
    "resident_id": "IDCARD IDCARDNUM",
    "passport": "PASSPORT PASSPORTNUM",
    "license_plate": "VEHICLE LICENSE_PLATE VEHICLEVRM",
    "ssn": "SSN SOCIALNUM SOCIALNUMBER",
    "card": "CREDITCARDNUMBER CREDITCARD CREDIT_CARD",
    "iban": "IBAN IBAN_CODE",
    "url": "URL",
    "ip_address": "IP IPV4 IPV6 IPADDR IP_ADDRESS",
}
KIND_OF_LABEL = {label: kind for kind, labels in _LABELS.items() for label in labels.split()}
MOST_TOKENS = 512  # a window, at most
_MADE_FOR = "ForTokenClassification"


class EntityModel(LocalRecognizer):
    """A Presidio recogniser of the model in `folder` that finds `kinds`.

    A token is of a kind if the probabilities of that kind's labels sum up to `least_score`; a
    finding covers whole words. Long texts are read in windows that overlap by a quarter, and a
    token found in any of them counts. Computed on the CPU in float32.

    Args:
        folder: with config.json, tokenizer.json and *.safetensors.
        kinds: those to find.
        least_score: 0 to 1.

    Raises:
        UsageError: E103 if the folder holds no such model, or one that finds none of `kinds`.
    """

    def __init__(self, folder: Path, kinds: Collection[str], least_score: float) -> None:
        self.folder, self.kinds, self.least_score = folder, kinds, least_score
        super().__init__(
            supported_entities=sorted(kinds), supported_language=LANGUAGE, name="entity_model"
        )

    def load(self) -> None:
        """Read the folder; called once by Presidio's constructor."""
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        self._check_folder()
        try:
            config = AutoConfig.from_pretrained(
                self.folder, local_files_only=True, trust_remote_code=False
            )
            self.tokenizer = AutoTokenizer.from_pretrained(
                self.folder, local_files_only=True, trust_remote_code=False
            )
            self.model, facts = AutoModelForTokenClassification.from_pretrained(
                self.folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
        except Exception as error:  # a damaged folder fails in many ways
            raise _refused(self.folder, f"cannot be read ({type(error).__name__})") from None
        if facts["missing_keys"]:
            raise _refused(self.folder, "lacks weights of its classifier or its layers")
        if not self.tokenizer.is_fast:
            raise _refused(self.folder, "has no fast tokenizer (tokenizer.json)")
        self.model.eval()
        labels = [_kind(config.id2label[at]) for at in range(config.num_labels)]
        self._columns = {
            kind: [at for at, other in enumerate(labels) if other == kind]
            for kind in sorted(self.kinds)
            if kind in labels
        }
        if not self._columns:
            names = ", ".join(sorted(map(str, config.id2label.values()))[:12])
            raise _refused(
                self.folder, f"has labels ({names}) of which none is a kind that is looked for"
            )
        most = getattr(config, "max_position_embeddings", None) or MOST_TOKENS
        # RoBERTa's positions begin at 2.
        self._window = min(self.tokenizer.model_max_length, most - 2, MOST_TOKENS)

    def _check_folder(self) -> None:
        try:
            config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            made_for = config.get("architectures") or []
        except (OSError, ValueError, AttributeError):
            raise _refused(self.folder, "has no readable config.json") from None
        if not any(str(name).endswith(_MADE_FOR) for name in made_for):
            names = ", ".join(map(str, made_for)) or "nothing"
            raise _refused(
                self.folder,
                f"is no token-classification model: its config.json names {names}, not "
                f"…{_MADE_FOR}",
            )
        for file in ("config.json", "tokenizer_config.json"):
            path = self.folder / file
            if path.is_file() and "auto_map" in path.read_text(encoding="utf-8"):
                raise _refused(self.folder, f"wants to run code of its own (auto_map in {file})")

    def analyze(
        self, text: str, entities: list[str], nlp_artifacts: Any = None
    ) -> list[RecognizerResult]:
        """Findings of every kind, which may overlap."""
        if not text.strip():
            return []
        coded = self.tokenizer(
            text,
            truncation=True,
            max_length=self._window,
            stride=self._window // 4,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding=True,
            return_tensors="pt",
        )
        coded.pop("overflow_to_sample_mapping", None)
        places = coded.pop("offset_mapping")
        with torch.inference_mode():
            chances: Tensor = self.model(**coded).logits.softmax(-1)  # [windows, tokens, labels]
        found = []
        for kind, columns in self._columns.items():
            scores = chances[..., columns].sum(-1)
            covered: dict[int, float] = {}
            for at in (scores >= self.least_score).nonzero().tolist():
                start, end = places[at[0], at[1]].tolist()
                for place in range(start, end):  # none for special tokens
                    covered[place] = max(covered.get(place, 0), scores[at[0], at[1]].item())
            found += [
                RecognizerResult(kind, start, end, min(1.0, score))
                for start, end, score in _stretches(text, covered)
            ]
        return found


def _stretches(text: str, covered: dict[int, float]) -> list[tuple[int, int, float]]:
    """Start, end and highest score of the covered places, as whole words; a space or a hyphen
    between two covered words is covered too."""
    found: list[tuple[int, int, float]] = []
    for place in sorted(covered):
        start, end = place, place + 1
        while start and _one_word(text[start - 1], text[start]):
            start -= 1
        while end < len(text) and _one_word(text[end - 1], text[end]):
            end += 1
        score = covered[place]
        if found and not text[found[-1][1] : start].strip(" -'.·"):
            start, score = found[-1][0], max(score, found.pop()[2])
        found.append((start, end, score))
    return found


def _one_word(left: str, right: str) -> bool:
    """Neighbours in a word of letters and digits; Chinese has no spaces, so there each character is
    by itself."""
    return all(char.isalnum() and not "\u2e80" <= char <= "\uffef" for char in (left, right))


def _kind(label: object) -> str:
    """Of a label such as B-PER; "" if it is none of ours."""
    name = str(label).upper()
    if name[:2] in {"B-", "I-", "E-", "S-", "L-", "U-"}:
        name = name[2:]
    return KIND_OF_LABEL.get(name.replace("-", "_").replace(" ", "_"), "")


def _refused(folder: Path, why: str) -> UsageError:
    return UsageError(
        f"[prepare.deidentify] in site.toml: the model folder {folder} {why}. Name a folder with a "
        "token-classification model whose labels are personal details, or leave `model` out.",
        code=ErrorCode.CONFIG_INVALID,
    )
