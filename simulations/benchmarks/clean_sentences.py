"""Clinical sentences without any personal detail, for false findings: `clean_sentences(language)`.

Hand-written sentences with slots, filled from a seed with hand-written clinical words. Many of the
words are also names, or look like names, numbers or dates: diseases and signs that are named after
people, drugs, places, days, months, scores, doses, ratios and versions. Whatever is found in one of
these sentences is a false finding. They are more hostile than ordinary notes in how many such words
they hold, and kinder in that they are well spelt.
"""

from __future__ import annotations

import random
import re

from silotune.simulations.benchmarks.labelled_texts import Language


def _lines(text: str) -> tuple[str, ...]:
    """One entry a line."""
    return tuple(line.strip() for line in text.strip().splitlines())


def _words(text: str, between: str = ";") -> tuple[str, ...]:
    """Entries between semicolons, or between spaces."""
    words = text.split(between) if between.strip() else text.split()
    return tuple(" ".join(word.split()) for word in words)


_EN_WORDS = {
    "disease": _words("""
        Parkinson's disease; Crohn's disease; Alzheimer's disease; Hodgkin lymphoma; Graves'
        disease; Hashimoto thyroiditis; Addison's disease; Cushing syndrome; Down syndrome;
        Marfan syndrome; Wilson disease; Bell's palsy; Huntington's chorea; Barrett's
        oesophagus; Raynaud phenomenon; Sjögren syndrome; Guillain-Barré syndrome; Kawasaki
        disease; Paget's disease; Turner syndrome; Wolff-Parkinson-White syndrome;
        Stevens-Johnson syndrome; Osgood-Schlatter disease; Dupuytren's contracture; Baker's
        cyst; Charcot foot; Ménière's disease; Reye syndrome; type 2 diabetes; atrial
        fibrillation; pneumonia; heart failure; gout; asthma; migraine; iron deficiency
        anaemia; chronic kidney disease; deep vein thrombosis; hepatitis B
    """),
    "sign": _words("""
        Murphy's sign; Babinski sign; Romberg test; Kernig's sign; Allen test; Tinel sign;
        Homans' sign; Trendelenburg gait; Cullen's sign; Chvostek sign; Phalen test; Weber
        test; McBurney's point tenderness; Lachman test; Rovsing sign; Apley grind test
    """),
    "score": _words("""
        Glasgow Coma Scale 15; Apgar 9/10; a Wells score of 3; CHA2DS2-VASc 4; Child-Pugh B;
        NYHA class II; Mallampati 2; ASA 3; a Barthel index of 85; MMSE 27/30; NIHSS 4; Bishop
        score 7
    """),
    "drug": _words("""
        metformin; Metoprolol; Lisinopril; Ramipril; warfarin; Apixaban; Amoxicillin; Tazocin;
        Augmentin; Ventolin; Lasix; Furosemide; Paracetamol; Ibuprofen; Sertraline; Humira;
        Keppra; Levothyroxine; Prednisolone; Atorvastatin; Omeprazole; Clopidogrel; Eliquis;
        Ritalin; Viagra; Lantus
    """),
    "dose": _words("""
        5 mg; 12.5 mg; 500 mg; 1 g; 2 puffs; 40 units; 0.3 ml; 75 mcg; 1,000 IU; 2.5 mg/kg
    """),
    "times": _words("""
        once daily; twice a day; three times daily; every 8 hours; at night; as needed; with
        meals; on alternate days; before breakfast
    """),
    "place": _words("""
        London; Paris; Charlotte; Florence; Sydney; Austin; Georgia; Virginia; Jordan; Israel;
        Chelsea; Houston; Dallas; Lincoln; Madison; Boston; Leeds; Adelaide; Victoria; Kent;
        New York; Mexico; San Antonio; St Louis; West Virginia
    """),
    "when": _words("""
        on Monday; last Tuesday; in April; in May; since August; over the summer; this autumn;
        in June; on Friday night; yesterday; at dawn; two weeks ago; overnight; at Easter; in
        March
    """),
    "part": _words("""
        left knee; right hip; lower back; chest; abdomen; left wrist; neck; right ear; scalp;
        both ankles; right iliac fossa; shoulder; temple; palm; sole; crown; jaw; bridge of
        the nose
    """),
    "symptom": _words("""
        pain; swelling; a rash; cough; breathlessness; nausea; dizziness; itching; fever;
        palpitations; a burning feeling; weakness; numbness; blurred vision; frank haematuria;
        night sweats; wheeze
    """),
    "test": _words("""
        CT head; MR angiography; chest X-ray; ECG; full blood count; ANA; HbA1c; troponin;
        urine dip; D-dimer; lumbar puncture; Doppler; Holter monitor; Kaplan-Meier curve;
        Western blot; PCR; EEG; Gram stain; Coombs test; echo
    """),
    "value": _words("""
        12.4; 138 mmol/L; 7.35; 120/80; 98%; 4.2; 1.5 x 10^9/L; 36.8; 3/4; 0.05; 45 ml/min;
        101 bpm; 2/6; 1:160; -2.5; 10-15; 180 over 95; 1.012
    """),
    "staff": _words("""
        the nurse; the doctor; our team; the consultant; the physiotherapist; the ward sister;
        the surgical registrar; the midwife; a specialist; the pharmacist; the dietitian; the
        GP
    """),
    "who": _words("""
        The patient; This patient; She; He; The child; This 64-year-old man; The baby; This
        lady; The mother; A young woman; The resident; This gentleman
    """),
    "relative": _words("""
        her daughter; his wife; the mother; her husband; his brother; the family; a friend
    """),
    "device": _words("""
        Foley catheter; Swan-Ganz catheter; Hickman line; Kirschner wire; Penrose drain; Ryles
        tube; Bair Hugger; Thomas splint; Zimmer frame; Schiotz tonometer; pacemaker; Guedel
        airway
    """),
    "verb": _words("""
        denies; reports; describes; complains of; presented with; returned with; developed
    """),
    "unit": _words("""
        Cardiology; the stroke ward; Day Surgery; Accident and Emergency; the burns unit;
        Radiology; the renal clinic; Theatre 4; Ward 7; Outpatients; Maternity; Intensive
        Care; Bay 3
    """),
    "procedure": _words("""
        a Whipple procedure; Hartmann's procedure; a Caesarean section; knee replacement;
        cataract surgery; a Nissen fundoplication; Mohs surgery; angioplasty; dialysis; an
        Epley manoeuvre; hernia repair
    """),
}

_EN = _lines("""
    {who} {verb} {symptom} in the {part}.
    {who} {verb} {symptom} {when}; no history of {disease}.
    Known {disease}, on {drug} {dose} {times}.
    {sign} negative, {score}.
    Past medical history: {disease}, {disease} and {disease}.
    Start {drug} {dose} {times}, then review {when}.
    {test} shows no change; {test} to follow {when}.
    {test}: {value}, within normal limits.
    Discussed with {staff}; {relative} will be told {when}.
    {who} was transferred from {unit} to {unit} {when}.
    {device} removed without trouble, output {value}.
    {who} travelled to {place} and {place} {when}.
    Plan: {test}, {drug} {dose}, and refer to {unit}.
    Will need {procedure}; may go home {when}.
    Mark the site, chase the {test}, and page {staff}.
    Allergies: {drug}, {drug}. Reaction: {symptom}.
    There is a family history of {disease} on the maternal side.
    {who} is well, alert and oriented; BP 120/80, SpO2 98%.
    Grade 2 tear of the {part}; rest, ice and {drug} advised.
    IMPRESSION: NO ACUTE FINDING. FOLLOW UP AS NEEDED.
    PAST HISTORY: HYPERTENSION, GOUT. MAY TAKE PARACETAMOL.
    Patient Information Leaflet given and read.
    {who} hopes to walk with a Zimmer frame by the summer.
    The bill for {procedure} was sent to the insurer {when}.
    Rose-coloured {symptom} over the {part}, fading {when}.
    {staff} reviewed the {test} and stopped {drug}.
    Risk of {disease} is about 1 in 20, odds ratio 1.8 (95% CI 1.2-2.7).
    Score: {score}. {sign} positive on the left.
    {drug} was changed to {drug} because of {symptom}.
    Dear Colleague, thank you for referring this patient with {disease}.
    Dear Sir or Madam, please find the {test} enclosed.
    {who} lives alone in a flat in {place} and mobilises with a stick.
    No {symptom}, no {symptom}, no {symptom}; bowels open, eating well.
    Vitamin D low at {value}; {drug} {dose} {times}.
    Hepatitis B immune; HIV and Lyme serology negative.
    {who} drank a glass of wine a day and stopped {when}.
    Chest clear. Heart sounds normal. Abdomen soft. {sign} absent.
    Consent taken for {procedure}; {staff} will list {when}.
    On Warfarin; INR {value}, target 2-3.
    The ward round starts at 9; {unit} closes at half past five.
    Firmware 4.2.1 of the pump was replaced by 4.3.0.
    Section 12.4 of the protocol, page 17, table 3, row 9.
    Order set A-2291 includes {test} and {test}.
    {who} fell on a hard floor {when} and hit the {part}.
    May cause drowsiness; do not drive. Take {dose} {times}.
    Left hospital against advice; failed swallow test; attended {unit} {when}.
    Grant access to the portal, then ask {relative} to ring.
    Discharge Summary. Reason For Admission: {symptom}. Final Diagnosis: {disease}.
    Social worker informed; {relative} visits daily.
    Hope is that {drug} lets {relative} cope at home.
    Stage III cancer of the {part}, treated in {place} with {procedure}.
    Cells grow in Eagle medium; Giemsa, Ziehl-Neelsen and Gram stains done.
    In the trial from {place}, {drug} beat placebo (p = 0.03, n = 1,204).
    Weight 72 kg, height 1.78 m, BMI 22.7; pulse 88, temperature 36.9.
    Dry dressing to {part}; sutures out in 10 days.
    {procedure} was cancelled because {test} was not done {when}.
    Resting tremor and rigidity suggest {disease}; {drug} trial planned.
    Bed 12 is free; move the next patient from {unit}.
    On examination {sign} was positive, {score}.
    {relative} noticed {symptom} and rang 111 {when}.
""")

_ZH_WORDS = {
    "病": _words(
        """
        高血压病 糖尿病 冠心病 帕金森病 阿尔茨海默病 克罗恩病 桥本甲状腺炎 库欣综合征 川崎病
        慢性阻塞性肺疾病 房颤 黄疸 石膏固定术后 痛风 哮喘 白癜风 肺炎 胃溃疡 霍奇金淋巴瘤
        唐氏综合征 马凡综合征 高脂血症 颈椎病
    """,
        " ",
    ),
    "症": _words(
        """
        头痛 胸闷 气短 咳嗽 咳痰 发热 乏力 恶心 呕吐 腹痛 腹泻 心悸 水肿 皮疹 视物模糊 张口困难
        夜间盗汗 黄色脓痰
    """,
        " ",
    ),
    "药": _words(
        """
        阿司匹林 二甲双胍 美托洛尔 华法林 氨氯地平 头孢曲松 奥美拉唑 布洛芬 阿托伐他汀 甘露醇
        金匮肾气丸 云南白药 马来酸依那普利 黄芪颗粒 柴胡口服液 甘草片
    """,
        " ",
    ),
    "量": _words(
        """
        5mg 0.5g 100mg 10毫升 2片 20单位 1.5克
    """,
        " ",
    ),
    "时": _words(
        """
        周一 昨日 上周五 三天前 近两周 术后第三天 今晨 夏季 春节期间 入院后 夜间 半年前
    """,
        " ",
    ),
    "检": _words(
        """
        血常规 头颅CT 胸片 心电图 肝功能 肌酐 糖化血红蛋白 腹部彩超 尿常规 核磁共振 肌钙蛋白
        万古霉素血药浓度
    """,
        " ",
    ),
    "值": _words(
        """
        5.6 120/80mmHg 98% 3/4 12.4g/L 7.35 38.2℃ 1:160 0.05 86次/分
    """,
        " ",
    ),
    "部": _words(
        """
        左膝 右肩 腰部 上腹部 左侧胸壁 颈部 双下肢 右耳 头皮 足背
    """,
        " ",
    ),
    "人": _words(
        """
        患者 患儿 产妇 病人 老人
    """,
        " ",
    ),
    "员": _words(
        """
        主治医师 护士 值班医生 麻醉师 主任医师 营养师 管床医生
    """,
        " ",
    ),
    "地": _words(
        """
        北京 上海 广州 江苏 成都 石家庄 金华 黄山 常州 连云港 安康 高雄
    """,
        " ",
    ),
    "科": _words(
        """
        心内科 骨科 急诊科 重症监护室 门诊 康复科 妇产科 血液透析室 放射科
    """,
        " ",
    ),
}

_ZH = _lines("""
    {人}{时}出现{症}，伴{症}，无{症}。
    既往有{病}、{病}病史十年，长期口服{药}{量}。
    {检}{值}，未见明显异常。
    给予{药}{量}，每日三次，{时}复查{检}。
    查体：{部}压痛，余无特殊。
    {员}查房后建议继续{药}治疗，密切观察。
    {人}方便时复查，任何不适请及时就诊。
    {人}高热不退，{时}转入{科}。
    {人}安静，精神可，饮食睡眠一般。
    {检}提示{病}可能，请{科}会诊。
    否认{病}、{病}家族史，否认药物过敏史。
    {人}曾于{时}在{地}务工，无疫区接触史。
    医生常规检查，方可出院；何时复查另行通知。
    {部}石膏固定良好，末梢血运正常。
    {时}行手术治疗，术程顺利，出血约50毫升。
    血压{值}，心率86次/分，体温36.8℃，呼吸18次/分。
    {药}已停用，改为{药}{量}口服。
    向家属交代病情，家属表示理解并同意治疗方案。
    {人}马上安排{检}，结果回报后再定。
    金黄色葡萄球菌阴性，白细胞计数{值}。
    {员}已告知注意事项，嘱低盐低脂饮食。
    {人}因{症}入住{科}，经{药}治疗后好转。
    高龄、高危人群应当常规筛查{病}。
    任务：完成{检}，联系{科}，整理病历资料。
    {时}开始康复训练，{部}活动度明显改善。
    全国多中心研究显示{药}有效率为{值}。
    单侧{部}疼痛，疼痛评分{值}，向{部}放射。
    {地}和{地}两地的流行病学资料相似。
    计划{时}拔除引流管，严格记录出入量。
    {人}平素体健，时有{症}，未予重视。
    温水擦浴，物理降温，体温逐渐下降。
    {科}床位已满，暂在走廊加床观察。
    于{时}再次出现{症}，程度较前加重。
    系统版本4.2.1已更新，请重新登录。
    病理报告：{病}，切缘阴性，建议定期随访。
    经济条件一般，医保余额不足，已与{员}沟通。
    许多{人}在{时}症状明显，夜间尤其严重。
    白天精神尚可，夜间{症}明显，{药}效果不佳。
    本例{病}少见，文献报道不多。
    康复出院，嘱{时}门诊随诊，{药}继续服用。
""")

_WORDS: dict[Language, dict[str, tuple[str, ...]]] = {"en": _EN_WORDS, "zh": _ZH_WORDS}
_SENTENCES: dict[Language, tuple[str, ...]] = {"en": _EN, "zh": _ZH}


def clean_sentences(language: Language, count: int, seed: int) -> list[str]:
    """`count` sentences, no two of them equal, in turn of every template."""
    rng = random.Random(f"clean {language} {seed}")  # noqa: S311 - nothing secret
    found: dict[str, None] = {}
    at = 0
    while len(found) < count:
        template = _SENTENCES[language][at % len(_SENTENCES[language])]
        text = re.sub(r"\{(\w+)\}", lambda slot: rng.choice(_WORDS[language][slot[1]]), template)
        found.setdefault(text[0].upper() + text[1:])
        at += 1
    return list(found)
