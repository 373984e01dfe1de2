"""What stands beside a name in English text: titles, labels, roles, relatives, verbs and places."""

from __future__ import annotations

import re

from silotune.client.preparation.latin import LETTERS, bounded
from silotune.client.preparation.name_lists import words_of

PARTICLES = words_of(
    "van von der den de del della di da dos das do la le el al bin ibn ben bint abu ter ten zu af "
    "st san y e"
)
_SHORT_TITLES = words_of("mr mrs ms miss mx messrs dr drs prof rev sgt capt")
SURE_TITLES = words_of("mr mrs miss mx messrs")  # hardly ever another word
LONG_TITLES = words_of(
    "doctor professor sir dame lady lord nurse sister brother reverend father judge justice "
    "captain officer pastor rabbi imam midwife matron uncle aunt auntie rn"
)
TITLES = _SHORT_TITLES | LONG_TITLES
# What stands before a person: a label, enough for any capitalised word.
LABEL = re.compile(
    bounded(
        r"(?:\b(?:patient|pt|client|customer|beneficiary|payee|payer|"
        r"(?:card|account|policy) ?holder|attending(?: physician)?|physician|surgeon|"
        r"provider|consultant|sender|recipient|signed|attn|attention|carer|guardian|witness|"
        r"applicant|employee|member|contact|author|doctor|dr|nurse|gp|clinician|registrar|keyworker|"
        r"key worker|midwife|therapist|interpreter|"
        r"reviewed by|seen by|written by|reported by|dictated by|typed by|verified by|"
        r"emergency contact|cc)(?: name)?\s*[:=]\s*"
        r"|\bDear |\b(?:regards|sincerely|thanks|cheers|yours|faithfully|wishes),?\s+"
        r"|\b(?:my name is|this is|signed by|named|called|known as|aka|née|nee|"
        r"(?:name|known) (?:really )?(?:is|as)|i am|i'm) "
        r"|(?:姓名|名字|我是|我叫|名叫|叫做|自称|化名|昵称|户主|户名|联系人|收件人|寄件人|发件人|经办人|持卡人|收款人|"
        r"付款人|申请人|患者|病人|家属|朋友|同事|同学|室友|老公|老婆|丈夫|妻子|先生|女士|医生|护士)[为是叫]?[:\s]*)$"
    ),
    re.IGNORECASE,
)
COLON = re.compile(r"[:=]\s*$")
# A form's field for a name: what follows is one, whatever its letters.
FIELD = re.compile(
    r"(?:\b(\w+)[ _])?\b(?:names?|surname|forenames?|next of kin|nok)\s*[:=][ \t]*", re.IGNORECASE
)
NO_NAME_FIELD = words_of(
    "drug test file product trade brand generic hospital host domain study trial company bank "
    "medication device clinic ward school employer pharmacy procedure street site column sheet "
    "user login group"
)
# The second sort makes a word likelier to be a name.
KIN = re.compile(
    bounded(
        r"\b(?:patient|husband|wife|son|daughter|mother|father|brother|sister|partner|spouse|friend|"
        r"neighbou?r|aunt|uncle|nephew|niece|carer|colleague|referring|seen by|reviewed by|spoke "
        r"(?:to|with)|discussed with|examined by|reported by|written by|paid to|transfer(?:red)? "
        r"to|sent "
        r"to|holder|beneficiary|customer|client|nurse|physician|by|with|w/|to|from|and|for|"
        r"asked|told|rang|called|phoned|emailed|texted|messaged|thanked|informed|cc|via),? $"
    ),
    re.IGNORECASE,
)
# Before a family name by itself; "to" and "from" stand before places, too.
NEXT_TO = re.compile(
    bounded(r"\b(?:by|with|w/|for|and|asked|told|rang|called|phoned|emailed|cc) $"), re.IGNORECASE
)
# Words for a person's part in something: a listed name behind one, or two words with capitals.
_ROLES = (
    "witness|landlord|landlady|tenant|lodger|owner|lessee|buyer|seller|vendor|purchaser|sponsor|"
    "visitor|guest|host|agent|advisor|adviser|broker|adjuster|handler|candidate|applicant|interviewer|"
    "referee|referrer|reporter|insured|claimant|defendant|appellant|complainant|respondent|suspect|"
    "victim|driver|passenger|rider|pilot|prescriber|pharmacist|dentist|optician|paramedic|porter|"
    "registrar|consultant|secretary|receptionist|assistant|manager|supervisor|director|officer|clerk|"
    "cashier|teller|courier|engineer|technician|analyst|lecturer|tutor|teacher|student|pupil|trainee|"
    "intern|resident|fellow|caller|requester|requestor|approver|assignee|delegate|attendee|panel|"
    "speaker|chair|organizer|organiser|contractor|employee|employer|remitter|payee|payer|debtor|creditor|"
    "cardholder|guarantor|executor|trustee|heir|cosigner|signatory|translator|interpreter|solicitor|"
    "lawyer|attorney|barrister|notary|judge|detective|constable|inspector|sergeant|inmate|detainee|"
    "flatmate|roommate|housemate|cousin|grandma|grandpa|granny|mum|mom|dad|twin|boyfriend|girlfriend|"
    "stepson|stepdaughter|stepmother|stepfather|boss|line manager|chaperone|escort|donor|"
    "sho|scrub nurse|nanny|babysitter|tutor|mentor|winner|runner-up|legal name|"
    "hi|hello|hey|dear|thank you|thanks to|thanks|thx|cheers|morning|signed"
)
ROLE_WORDS = frozenset(_ROLES.split("|"))
ROLE = re.compile(
    bounded(
        rf"\b(?:{_ROLES}|"
        r"hand(?:ed)?[ -]?over to|escalated to|assigned to|forwarded to|delegated to|reported to|"
        r"ask|tell|call|contact|text|email|remind|seen|copied to|cc to|addressed to|owed to|sold "
        r"to|seen with|met|met with|met w/|asked|told|thanked|"
        r"reminded|rang|phoned|emailed|texted|managed|supervised|authori[sz]e|reference for|rx for|"
        r"prescription for|refund for|behalf of|regards from|signed by|approved by|taken by|given "
        r"by|issued to|invoice to|w-[0-9] (?:received )?from|ok per|per)[:,]? $"
        r"|\b(?:from|to|cc|bcc|attn|fao): ?$|@$"
    ),
    re.IGNORECASE,
)
ROLE_LABEL = re.compile(bounded(rf"\b(?:{_ROLES})\s*[:=]\s*$"), re.IGNORECASE)
# What several people stand behind.
PEOPLE = re.compile(
    bounded(
        rf"\b(?:(?:{_ROLES})s|witnesses|present|absent|apologies|attendees|attending|assigned(?: "
        r"to)?|roll call|participants|members|players|crew|team|staff|on shift|on "
        r"duty|names|invited|guests|children|siblings|sons|daughters|parents|authors|signatories|beneficiaries|trustees)\s*:\s*$"
    ),
    re.IGNORECASE,
)
TICKET = re.compile(r"(?<![A-Z])[A-Z]{2,20}/[A-Z]{2,20} (?:MR|MRS|MS|MISS|MSTR|DR)(?![A-Z])")
VERB_AFTER = re.compile(
    r"(?:'s)? (?:has|is|was|had|will|would|did|does|can|could|knows|needs|feels|felt|seems|appears|"
    r"took|takes|came|went|got|made|started|stopped|returned|tried|thought|also|always|never)\b"
)
ARTICLE = re.compile(
    r"\b(?:the|an?|this|that|these|each|every|our|your|its|no|any|some|of|in|on|at|to|into|per|than|"
    r"as|or) $",
    re.IGNORECASE,
)
MAILBOX = re.compile(r" ?<[^<>\s]+@")
SPOKE = re.compile(bounded(r"\b(?:spoke|spoken|speak|talked|chatted) (?:to|with) $"), re.IGNORECASE)
RELATIVE = re.compile(
    bounded(
        r"\b(?:husband|wife|son|daughter|mother|father|brother|sister|partner|spouse|aunt|uncle|nephew|"
        r"niece|grand(?:son|daughter|mother|father)|fianc[eé]e?|nurse|neighbou?r|colleague|nanny|"
        r"babysitter|(?:spoke|speak|spoken|talked|met) (?:to|with)),? $"
    ),
    re.IGNORECASE,
)
DOES = re.compile(  # what people do, behind a name
    r",? (?:(?:was|is|has been|had been) (?:seen|admitted|referred|discharged|reviewed|born|"
    r"an? \d)|called|said|says|reports?|denies|denied|complains?|presents?|presented|attended|"
    r"asked|wrote|left|failed|lives|works|states|requested|confirmed|phoned|rang|telephoned|emailed|"
    r"who|aged|born|DOB|MD\b|RN\b|\()",
    re.IGNORECASE,
)
ACTS = re.compile(  # what nothing but a person does
    r" (?:(?:has |have |had |also |then |just |never |kindly )?(?:said|says|sat|asked|asks|"
    r"answered|rang|phoned|telephoned|emailed|texted|told|replied|agreed|agrees|refused|gave|called|wrote|"
    r"promised|apologi[sz]ed|admitted|insisted|explained|mentioned|wants|wanted|thinks|knows|lives|"
    r"works|visited|arrived|attended|signed|paid|picked up|dropped off|helped|cried|smiled|laughed|"
    r"took|takes|came|went|got|has|had|needs|feels|felt|started|stopped|returned|tried|thought|"
    r"can't|won't|didn't|doesn't|slept|ate|drove|joined|moved|booked|declined|denies|denied|recalls|remembers|believes|prefers|"
    r"is on (?:shift|call|leave|duty)|on (?:shift|call|duty)|to (?:confirm|follow up|review|check|"
    r"decide|call|advise|chase)|at the (?:front )?(?:desk|reception|counter|till|bar)|"
    r"(?:from|in) (?:accounts?|accounting|billing|finance|payroll|hr|it|sales|support|legal|claims|"
    r"radiology|pharmacy|reception|vendor|procurement|the (?:lab|office|ward|clinic|bank)))\b)"
    r"|, (?:his|her|their|my|the patient's|pt's) (?:\w+ )?(?:son|daughter|wife|husband|mother|"
    r"father|mum|mom|dad|brother|sister|partner|spouse|carer|friend|aunt|uncle|niece|nephew|cousin|"
    r"neighbou?r|flatmate|boss|manager|colleague|gran\w*)\b",
    re.IGNORECASE,
)
CLOSING = re.compile(
    r"\b(?:regards|sincerely|faithfully|thanks|thank you|cheers|yours|best|wishes|love|"
    r"respectfully|cordially|gratefully|ta|xx?)[,.!]?\s*$",
    re.IGNORECASE,
)
# The speaker of a line of a chat; a prefix (a time, [chat], a role) says that it is one.
SPEAKER = re.compile(
    r"^[ \t]*(?P<sign>(?:\[[^\]\n]{1,24}\]|\(?\d{1,2}:\d{2}(?::\d{2})?\)?(?: ?[ap]m)?|[-*>])"
    r"[ \t]*)?"
    rf"(?P<role>(?:agent|caller|customer|client|user|advisor|adviser|operator|support|rep|host|nurse|"
    rf"doctor|patient)[ \t]+)?"
    rf"(?P<name>[{LETTERS}][{LETTERS}'.-]*(?: [{LETTERS}][{LETTERS}'.-]*){{0,3}})"
    r"(?: ?\([^)\n]{1,20}\))?[ \t]?[:>](?!/)",
    re.MULTILINE | re.IGNORECASE,
)
GREETED = re.compile(
    rf"(?:^|[.!\n] ?)(?:hi|hello|hey|hiya|good (?:morning|afternoon|evening|day)|dear \w+)"
    rf"(?: (?:all|team|both|there|everyone|folks|guys|again|\w+))?[,!.:-]* "
    rf"(?P<name>[{LETTERS}][{LETTERS}'-]*(?: [{LETTERS}][{LETTERS}'-]*)?) (?:here|from|speaking)\b",
    re.IGNORECASE,
)
MONTH_NAMES = words_of("april may june august summer winter spring autumn")
PLACE_WORDS = re.compile(r"\b(?:from|in|at|near|of|to|through|via|around) $", re.IGNORECASE)
INSIDE_PLACE = re.compile(r"\b(?:in|at|near|of|through|via|around) $", re.IGNORECASE)
AMONG_PLACES = re.compile(r"\b(?:from|in|to|travel\w*|visit\w*|via) (?:\w+ )?\w+,? (?:and|or) $")
NOUNS = (  # eponyms, organisations and places end with one of them
    "disease|syndrome|lymphoma|palsy|sign|test|score|scale|index|catheter|thyroiditis|carcinoma|"
    "sarcoma|tumou?r|criteria|classification|curve|reflex|manoeuvre|maneuver|position|procedure|"
    "fracture|contracture|phenomenon|anaemia|anemia|chorea|encephalopathy|o?esophagus|ulcer|stain|"
    "plot|splint|frame|line|wire|drain|tube|forceps|clamp|murmur|pupil|gait|cyst|foot|point|law|"
    "node|nodes|nodule|body|bodies|operation|repair|graft|needle|medium|agar|branch|bank|clinic|"
    "hospital|office|road|street|avenue|lane|drive|square|airport|university|college|school|county|"
    "airlines?|inc|ltd|llc|plc|ward|wing|centre|center|institute|trust|house"
)
A_NOUN = re.compile(NOUNS)
AND = re.compile(r" ?(?:,|;|/|、|&)? ?(?:(?:and|or|&|und|y|et) )?|[和与及、,]")
NO_PERSON = re.compile(rf"(?:'s)?[ -](?:{NOUNS})\b", re.IGNORECASE)
PLACE = re.compile(r"\b(?:St|Saint|San|Santa|Port|Fort|Mount|Lake|Cape|New|West|South)\.? $")
CLASS = words_of(  # a letter behind one of these is no initial
    "vitamin vitamins hepatitis type group stage class grade factor protein influenza part section "
    "figure table plan bed bay unit appendix level category phase strain serotype antigen region "
    "block site arm child-pugh pugh borderline lead"
)
NO_INITIALS = words_of("iv im po sc pr us uk prn eg ie")  # I.V., U.S.
