"""Synthetic bank payments: free-text comments and the operation codes a bank files them under.

An operation is what is paid for (WHATS), the stage of the deal (ACTS) and the other side of it (SCOPES). A
code takes at least two of the three to tell: other codes share each of its wordings. All names are invented.
"""

import csv
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

ENGLISH_SHARE = 0.45
RUSSIAN_SHARE = 0.35  # what remains is Russian in Latin letters
UNSAID_SHARE = 0.03
BIG_CLASS_SHARE = 0.02
LONGEST = 180

# English and Russian, alternatives separated by "|". Russian nouns stand in the case that their acts govern.
WHATS: dict[str, tuple[str, str]] = {
    "goods": ("goods|merchandise|consumer goods", "товар|товары|ТНП"),
    "equipment": ("equipment|machinery|plant equipment", "оборудование|станки|заводское оборудование"),
    "raw": ("raw materials|metal products|polymer", "сырье|металлопродукцию|полимер"),
    "medicine": ("medicines|medical products", "медикаменты|лекарства"),
    "fuel": ("diesel fuel|oil products", "дизтопливо|нефтепродукты"),
    "vehicles": ("vehicles|trucks", "автомобили|грузовой транспорт"),
    "freight": ("freight|transport services|cargo transport", "фрахт|транспортные услуги|перевозку груза"),
    "software": ("software|software license|IT services", "ПО|лицензию на ПО|ИТ услуги"),
    "consulting": ("consulting services|audit services", "консультационные услуги|аудиторские услуги"),
    "advertising": ("advertising services|marketing", "рекламные услуги|маркетинг"),
    "rent": ("rent of office|rent of premises|warehouse rent", "аренду офиса|аренду помещения|аренду склада"),
    "construction": ("construction works|installation works", "строительные работы|монтажные работы"),
    "repair": ("repair services|equipment maintenance", "услуги по ремонту|обслуживание оборудования"),
    "telecom": ("communication services|internet services", "услуги связи|услуги интернет"),
    "tuition": ("tuition|education services|study", "обучение|образовательные услуги|учебу"),
    "treatment": ("treatment|medical services", "лечение|медицинские услуги"),
    "salary": ("salary|wages", "заработной платы|зарплаты"),
    "funds": ("funds|money|personal funds", "средств|денежных средств|личных средств"),
    "charity": ("charity donation|charity aid", "пожертвования|благотворительной помощи"),
    "loan": ("loan|loan principal|credit", "займа|основного долга|кредита"),
    "interest": (
        "loan interest|interest|credit interest",
        "процентов по займу|процентов|процентов по кредиту",
    ),
    "deposit": ("deposit|term deposit", "депозита|срочного вклада"),
    "dividends": ("dividends|share of profit", "дивидендов|доли прибыли"),
    "vat": ("VAT|value added tax", "НДС|налога НДС"),
    "duty": ("customs duty|duty and fees", "таможенной пошлины|пошлины и сборов"),
    "income tax": ("income tax|profit tax", "подоходного налога|налога на прибыль"),
    "social": ("social contributions|social tax", "социальных отчислений|социального налога"),
    "penalty": ("penalty|fine and penalty", "штрафа|пени и штрафа"),
    "premium": ("insurance premium|insurance fee", "страховой премии|страхового взноса"),
    "claim": ("insurance indemnity|insurance claim", "страхового возмещения|страховой выплаты"),
    "trip": ("travel expenses|business trip expenses", "командировочных расходов|расходов на поездку"),
}

ACTS: dict[str, tuple[str, str]] = {
    "pay": ("payment for|transfer for|paid for", "оплата за|платеж за|перечисление за"),
    "advance": (
        "advance payment for|prepayment for|advance - yes, balance - no, for",
        "предоплата за|аванс за|авансовый платеж за",
    ),
    "final": (
        "final payment for|balance payment for|advance - no, balance - yes, for",
        "окончательная оплата за|окончательный расчет за|остаток оплаты за",
    ),
    "refund": ("refund for|refund of payment for", "возврат оплаты за|возврат средств за"),
    "settle": ("payment of|transfer of|remittance of", "оплата|перечисление|выплата"),
    "partial": ("part payment of|first part of", "частичная оплата|первая часть"),
    "issue": ("issue of|disbursement of", "выдача|предоставление"),
    "repay": ("repayment of|return of", "погашение|возврат"),
}

# What a payer writes who leaves the stage of the deal out.
PLAIN_ACTS = {
    "advance": "pay",
    "final": "pay",
    "refund": "pay",
    "partial": "settle",
    "issue": "settle",
    "repay": "settle",
}

SCOPES: dict[str, tuple[str, str]] = {
    "import": (
        "under import contract|import|import supply",
        "по импортному контракту|импорт|поставка импорт",
    ),
    "export": (
        "under export contract|export|export supply",
        "по экспортному контракту|экспорт|поставка экспорт",
    ),
    "home": (
        "to resident|local company|resident - yes, non-resident - no",
        "резиденту|местная компания|резидент - да, нерезидент - нет",
    ),
    "foreign": (
        "to non-resident|foreign company|resident - no, non-resident - yes",
        "нерезиденту|иностранная компания|резидент - нет, нерезидент - да",
    ),
    "bank": ("to bank|bank credit line|bank agreement", "банку|кредитная линия банка|договор с банком"),
    "founder": ("founder|company founder|parent company", "учредитель|учредитель компании|головная компания"),
    "leasing": ("leasing|under leasing agreement", "лизинг|по договору лизинга"),
    "cargo": ("cargo|import cargo|export cargo", "груз|импорт груза|экспорт груза"),
    "customs": ("customs|customs post|customs declaration", "таможня|таможенный пост|таможенная декларация"),
    "budget": ("to budget|state budget|tax office", "в бюджет|госбюджет|налоговая инспекция"),
    "self": (
        "to own account|own account|between own accounts",
        "на свой счет|свой счет|между своими счетами",
    ),
    "relatives": ("family support|to relatives|for family", "помощь семье|родственникам|для семьи"),
    "person": ("to individual|individual person", "физлицу|физическое лицо"),
    "staff": ("to staff|company employees|employees", "сотрудникам|работникам компании|персонал"),
    "abroad": ("abroad|foreign institution", "за рубежом|иностранное учреждение"),
}

PRIVATE_SCOPES = {"self", "relatives", "person", "staff", "abroad"}


class Operation(NamedTuple):
    code: str
    what: str
    acts: str  # several, the usual one first, where the stage does not matter
    scope: str


ANY_STAGE = "pay advance final"

# In the order of class sizes. The two largest differ in the stage alone: most mistakes are made between them.
OPERATIONS = [
    Operation("10151", "goods", "advance", "import"),
    Operation("010151", "goods", "final", "import"),
    Operation("20101", "freight", ANY_STAGE, "foreign"),
    Operation("30202", "funds", "settle", "self"),
    Operation("30101", "salary", "settle", "staff"),
    Operation("40102", "loan", "repay", "bank"),
    Operation("50101", "vat", "settle", "budget"),
    Operation("20102", "freight", ANY_STAGE, "home"),
    Operation("30201", "funds", "settle", "relatives"),
    Operation("10161", "equipment", "advance", "import"),
    Operation("20201", "software", ANY_STAGE, "foreign"),
    Operation("40101", "loan", "issue", "home"),
    Operation("10162", "equipment", "final", "import"),
    Operation("020202", "software", ANY_STAGE, "home"),
    Operation("10152", "goods", "advance", "export"),
    Operation("40201", "interest", "settle repay", "bank"),
    Operation("70101", "tuition", ANY_STAGE, "abroad"),
    Operation("010152", "goods", "final", "export"),
    Operation("20301", "consulting", ANY_STAGE, "foreign"),
    Operation("10171", "raw", "advance", "import"),
    Operation("50201", "duty", "settle", "customs"),
    Operation("30203", "funds", "settle", "person"),
    Operation("20401", "rent", ANY_STAGE, "home"),
    Operation("40103", "loan", "issue", "foreign"),
    Operation("60101", "premium", "settle", "cargo"),
    Operation("10153", "goods", ANY_STAGE, "home"),
    Operation("70201", "treatment", ANY_STAGE, "abroad"),
    Operation("10172", "raw", "final", "import"),
    Operation("40104", "loan", "repay", "foreign"),
    Operation("20302", "consulting", ANY_STAGE, "home"),
    Operation("30401", "charity", "settle", "home"),
    Operation("10154", "goods", "refund", "import"),
    Operation("50102", "vat", "settle", "customs"),
    Operation("70301", "trip", "settle", "staff"),
    Operation("40401", "dividends", "settle", "founder"),
    Operation("20501", "advertising", ANY_STAGE, "foreign"),
    Operation("010161", "equipment", ANY_STAGE, "home"),
    Operation("40202", "interest", "settle repay", "foreign"),
    Operation("50301", "income tax", "settle", "budget"),
    Operation("20601", "construction", "advance", "home"),
    Operation("10181", "medicine", ANY_STAGE, "import"),
    Operation("60201", "premium", "settle", "staff"),
    Operation("020401", "rent", ANY_STAGE, "person"),
    Operation("30102", "salary", "partial", "staff"),
    Operation("10173", "raw", ANY_STAGE, "home"),
    Operation("20602", "construction", "final", "home"),
    Operation("30204", "funds", "settle", "staff"),
    Operation("70102", "tuition", ANY_STAGE, "home"),
    Operation("20103", "freight", "refund", "foreign"),
    Operation("10191", "fuel", ANY_STAGE, "import"),
    Operation("40105", "loan", "issue", "founder"),
    Operation("050202", "duty", "partial", "customs"),
    Operation("20502", "advertising", ANY_STAGE, "home"),
    Operation("10155", "goods", "refund", "export"),
    Operation("60102", "premium", "settle", "foreign"),
    Operation("70202", "treatment", ANY_STAGE, "home"),
    Operation("20402", "rent", ANY_STAGE, "foreign"),
    Operation("010171", "raw", ANY_STAGE, "export"),
    Operation("40106", "loan", "repay", "founder"),
    Operation("50302", "income tax", "settle", "foreign"),
    Operation("10192", "fuel", ANY_STAGE, "home"),
    Operation("30103", "salary", "settle", "foreign"),
    Operation("20203", "software", "refund", "foreign"),
    Operation("40301", "deposit", "settle", "bank"),
    Operation("60301", "claim", "settle", "home"),
    Operation("10163", "equipment", ANY_STAGE, "leasing"),
    Operation("20701", "repair", ANY_STAGE, "foreign"),
    Operation("70302", "trip", "settle", "relatives"),
    Operation("50303", "penalty", "settle", "budget"),
    Operation("40402", "dividends", "settle", "foreign"),
    Operation("020101", "freight", ANY_STAGE, "export"),
    Operation("10194", "vehicles", ANY_STAGE, "import"),
    Operation("40203", "interest", "settle repay", "founder"),
    Operation("20702", "repair", ANY_STAGE, "home"),
    Operation("30402", "charity", "settle", "foreign"),
    Operation("060302", "claim", "settle", "foreign"),
    Operation("10182", "medicine", ANY_STAGE, "home"),
    Operation("50401", "social", "settle", "budget"),
    Operation("40302", "deposit", "repay", "bank"),
    Operation("10195", "vehicles", ANY_STAGE, "leasing"),
    Operation("20801", "telecom", ANY_STAGE, "foreign"),
    Operation("50304", "penalty", "settle", "customs"),
    Operation("70203", "treatment", ANY_STAGE, "relatives"),
    Operation("50402", "social", "partial", "budget"),
    Operation("20802", "telecom", ANY_STAGE, "home"),
    Operation("10196", "vehicles", ANY_STAGE, "person"),
]

# A sample of few classes is made of these first: mostly one code for one thing paid for, and two for loans.
FIRST_CODES = {
    *("10151", "20101", "30202", "30101", "40102", "50101"),
    *("20201", "40101", "70101", "20301", "40201", "60101"),
}

ABBREVIATIONS = (
    {"payment": "pmt", "contract": "contr.", "agreement": "agr.", "services": "serv.", "equipment": "equip."}
    | {"invoice": "inv.", "company": "co."},
    {"предоплата": "предопл.", "оплата": "опл.", "договор": "дог.", "контракт": "контр.", "услуги": "усл."}
    | {"оборудование": "оборуд.", "компания": "комп."},
)

DOCUMENTS = (
    (
        "contract No {n}/{m} dd {date}",
        "invoice INV-{n} dd {date}",
        "agreement {n} of {date}",
        "No {n}-{m}",
        "ref {n}{m}",
    ),
    (
        "договор №{n}/{m} от {date}",
        "счет №{n} от {date}",
        "согл. дог. {n} от {date}г.",
        "№{n}-{m}",
        "инв. {n}{m}",
    ),
)

VAT_RATES = (("VAT 20%", "VAT 12% incl.", "incl. VAT 20%"), ("в т.ч. НДС 20%", "НДС 12%", "с НДС 20%"))
VAT_FREE = (("without VAT", "VAT exempt", "no VAT"), ("НДС не облагается", "без НДС", "НДС нет"))

COMMON_LAYOUTS = (
    "{act} {what} {scope} {doc}",
    "{act} {what} {scope} {doc}, {party}",
    "{act} {what} {scope}, {doc}; {vat}",
    "{scope}: {act} {what}, {party} {doc}",
    "{party}; {act} {what}; {scope}; {doc}",
    "{amount} {act} {what}, {scope}, {party}",
    "{doc} {act} {what} ({scope}) {vat}",
    "{act} {what} - {scope} - {party}, {amount}",
)
LAYOUTS = (
    (
        *COMMON_LAYOUTS,
        "{act} {what} {scope} amount {amount}, {vat}",
        "/RFB/{act} {what}\n{scope} {doc}\n{vat}",
        "{act} {what}, {scope}, {doc}, {party}, sender {sender}, {amount}, {vat}",
    ),
    (
        *COMMON_LAYOUTS,
        "{act} {what} {scope} на сумму {amount}, {vat}",
        "назначение: {act} {what}\n{scope} {doc}\n{vat}",
        "{act} {what}, {scope}, {doc}, {party}, отправитель {sender}, {amount}, {vat}",
    ),
)

UNSAID_SCOPES = (("as agreed", "as per documents"), ("согласно договоренности", "по документам"))

CURRENCIES = ("USD", "USD", "EUR", "RUB", "CNY", "KZT")

LATIN = str.maketrans(
    dict(zip("абвгдеёзийклмнопрстуфыэ", "abvgdeeziyklmnoprstufye", strict=True))
    | dict(zip("АБВГДЕЁЗИЙКЛМНОПРСТУФЫЭ", "ABVGDEEZIYKLMNOPRSTUFYE", strict=True))
    | {"ж": "zh", "х": "kh", "ц": "ts", "ч": "ch", "ш": "sh", "щ": "sch", "ю": "yu", "я": "ya"}
    | {"Ж": "Zh", "Х": "Kh", "Ц": "Ts", "Ч": "Ch", "Ш": "Sh", "Щ": "Sch", "Ю": "Yu", "Я": "Ya", "№": "N"}
    | {"ъ": "", "ь": ""}
)

FIRM_HEADS = ("Балт", "Дорв", "Келм", "Лорн", "Марв", "Нолт", "Пелг", "Рудв", "Селк", "Тарн", "Ворм", "Зелт")
FIRM_TAILS = ("арикс", "емон", "ивар", "одан", "урин", "елис", "огор", "антис", "укар", "ерун")
# Half of the firms are called after a trade, not the one they pay for: the name must not give the code away.
TRADES = ("", "", "", " Транс", " Мед", " Строй", " Трейд")
FIRMS = [head + tail + trade for head in FIRM_HEADS for tail in FIRM_TAILS for trade in TRADES]
COMPANIES = (
    [f"{firm.translate(LATIN)} {form}" for firm in FIRMS for form in ("LLC", "Ltd")],
    [f'{form} "{firm}"' for firm in FIRMS for form in ("ООО", "АО")],
)
SURNAMES = ("Дорванов", "Келмин", "Тарнаев", "Лорнева", "Марвина", "Нолтов", "Пелгина", "Рудваев", "Селкова")
RUSSIAN_PERSONS = [f"{name} {a}.{b}." for name in SURNAMES for a in "АБГДЕИКМ" for b in "АВНРСТ"]
PERSONS = ([person.translate(LATIN) for person in RUSSIAN_PERSONS], RUSSIAN_PERSONS)


class Wordings(NamedTuple):
    """An operation's alternatives in one language."""

    acts: tuple[str, ...]
    plain_acts: tuple[str, ...]
    whats: tuple[str, ...]
    scopes: tuple[str, ...]
    parties: Sequence[str]
    vats: tuple[str, ...]


def _wordings(operation: Operation, language: int) -> Wordings:
    acts = operation.acts.split()
    taxable = operation.code.lstrip("0")[0] in "12"
    return Wordings(
        acts=tuple(wording for act in acts for wording in ACTS[act][language].split("|")),
        plain_acts=tuple(ACTS[PLAIN_ACTS.get(acts[0], acts[0])][language].split("|")),
        whats=tuple(WHATS[operation.what][language].split("|")),
        scopes=tuple(SCOPES[operation.scope][language].split("|")),
        parties=(PERSONS if operation.scope in PRIVATE_SCOPES else COMPANIES)[language],
        vats=VAT_FREE[language] + (VAT_RATES[language] if taxable else ()),
    )


def _class_sizes(rows: int, classes: int) -> list[int]:
    """From the largest class to the rarest: a power law whose head is flattened until it sums to rows."""
    if rows == 0:
        return [0] * classes
    kept = min(classes, rows)
    if kept == 1:
        return [rows] + [0] * (classes - 1)
    largest = rows * (0.25 + 1 / kept)
    rarest = min(8 + 72 // kept, rows // kept)
    places = [math.log(rank) / math.log(kept) for rank in range(2, kept + 1)]

    def others(flatness: float) -> list[int]:
        return [max(rarest, int(largest * (rarest / largest) ** (place**flatness))) for place in places]

    low, high = 0.0, 64.0
    # Few halvings, so that the last bits of a platform's logarithm cannot reach the sizes.
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(others(middle)) < rows - largest else (low, middle)
    sizes = others(low)
    return [rows - sum(sizes), *sizes] + [0] * (classes - kept)


class _Writer:
    """Draws with random() alone: its sequence is the same in every Python version, choice() has changed."""

    def __init__(self, random: Callable[[], float]) -> None:
        self.random = random

    def pick(self, options: Sequence[str]) -> str:
        return options[int(self.random() * len(options))]

    def usual(self, options: Sequence[str]) -> str:
        """Pick as people do: the first of three wordings comes more often than the other two together."""
        draw = self.random()
        return options[int(draw * draw * len(options))]

    def number(self, low: int, high: int) -> int:
        return low + int(self.random() * (high - low))

    def comment(self, languages: tuple[Wordings, Wordings], may_leave_unsaid: bool) -> str:
        draw = self.random()
        language = 0 if draw < ENGLISH_SHARE else 1
        words = languages[language]
        unsaid = may_leave_unsaid and self.random() < UNSAID_SHARE
        text = self.pick(LAYOUTS[language]).format(
            act=self.usual(words.plain_acts if unsaid else words.acts),
            what=self.usual(words.whats),
            scope=self.usual(UNSAID_SCOPES[language] if unsaid else words.scopes),
            doc=self.document(language),
            party=self.pick(words.parties),
            sender=self.pick(COMPANIES[language]),
            amount=self.amount(language),
            vat=self.pick(words.vats),
        )
        if self.random() < 0.25:
            for full, short in ABBREVIATIONS[language].items():
                text = text.replace(full, short)
        if draw >= ENGLISH_SHARE + RUSSIAN_SHARE:
            text = text.translate(LATIN)
        return self.as_typed(text)[:LONGEST].rstrip()

    def document(self, language: int) -> str:
        day, month, year = self.number(1, 29), self.number(1, 13), self.number(2019, 2026)
        return self.pick(DOCUMENTS[language]).format(
            n=self.number(1, 9999), m=self.number(10, 99), date=f"{day:02}.{month:02}.{year}"
        )

    def amount(self, language: int) -> str:
        whole = int(self.random() * self.random() * 500_000) + 20
        cents = self.number(0, 100)
        currency = self.pick(CURRENCIES)
        return f"{currency} {whole:,}.{cents:02}" if language == 0 else f"{whole},{cents:02} {currency}"

    def as_typed(self, text: str) -> str:
        draw = self.random()
        if draw < 0.08:
            text = text.upper()
        elif draw < 0.12:
            text = text.title()
        elif draw < 0.90:
            text = text[0].upper() + text[1:]
        draw = self.random()
        at = int(self.random() * len(text))
        if draw < 0.12:
            text = text[:at] + text[at:].replace(" ", "  ", 1)
        elif draw < 0.20:
            text = text[:at] + text[at:].replace(" ", "\n", 1)
        elif draw < 0.26 and text[at].isalpha():
            text = text[:at] + (text[at] * 2 if draw < 0.23 else "") + text[at + 1 :]
        return text


def _operations(classes: int) -> list[Operation]:
    entering = sorted(OPERATIONS, key=lambda operation: operation.code not in FIRST_CODES)[:classes]
    return [operation for operation in OPERATIONS if operation in entering]


def _rows(sizes: list[int], seed: int) -> Iterator[tuple[str, str]]:
    random = Random(seed).random
    writer = _Writer(random)
    operations = _operations(len(sizes))
    codes = [operation.code for operation in operations]
    wordings = [(_wordings(operation, 0), _wordings(operation, 1)) for operation in operations]
    waiting = bytearray()
    for index, size in enumerate(sizes):
        waiting += bytes([index]) * size
    rows = len(waiting)
    big = [size >= BIG_CLASS_SHARE * rows for size in sizes]
    # Drawn without replacement, one byte a row: ten million rows take ten megabytes.
    for left in range(rows, 0, -1):
        at = int(random() * left)
        index = waiting[at]
        waiting[at] = waiting[left - 1]
        yield writer.comment(wordings[index], big[index]), codes[index]


def payments(rows: int, classes: int = len(OPERATIONS), seed: int = 0) -> Iterator[tuple[str, str]]:
    """Yield (payment comment, operation code)."""
    if rows < 0:
        raise ValueError(f"rows must not be negative, got {rows}")
    if not 1 <= classes <= len(OPERATIONS):
        raise ValueError(f"classes must lie between 1 and {len(OPERATIONS)}, got {classes}")
    return _rows(_class_sizes(rows, classes), seed)


def write_csv(path: Path, rows: int, classes: int = len(OPERATIONS), seed: int = 0) -> None:
    """Write the payments as CSV, header PaymentComment,OperCode; an interrupted run leaves no file."""
    unfinished = path.with_name(f"{path.name}.part")
    lines = payments(rows, classes, seed)
    try:
        with unfinished.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("PaymentComment", "OperCode"))
            writer.writerows(lines)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
