"""The words of the demo's world: names, and how each kind of fact is told, asked and answered.

Every list is ours to extend: a longer one makes the world larger. Knows no facts; `world.py` makes
them. Costs nothing.
"""

from dataclasses import dataclass

Term = dict[str, str]
"""One name in every language."""


@dataclass(frozen=True)
class Relation:
    """One kind of fact and all its wordings; {s} is the subject, {v} the value."""

    kind: str
    told: dict[str, tuple[str, ...]]
    """Wordings of the text; none of them equals the answer's. The subject comes first in each:
    what a small model has read as "value, then subject" it cannot say the other way round."""
    asked: dict[str, tuple[str, ...]]
    answered: dict[str, str]


def _terms(text: str) -> list[Term]:
    pairs = (item.split("|") for item in text.split(", "))
    return [{"en": en, "zh": zh} for en, zh in pairs]


SURNAMES = _terms(
    "Shen|沈, Lin|林, Gao|高, Tang|唐, Wei|魏, Luo|罗, Song|宋, Jiang|江, Fang|方, Qin|秦, Xu|许, "
    "Meng|孟, Bai|白, Cui|崔, Deng|邓, Fan|范, Huang|黄, Kang|康, Liu|柳, Yan|严"
)
GIVEN = _terms(
    "Lan|岚, Yun|云, Peng|鹏, Rui|瑞, Xia|霞, Kai|凯, Zhen|珍, Bo|博, Yue|月, Tao|涛, Ning|宁, "
    "Hua|华, Feng|峰, Qing|青, Lei|雷, Mei|梅, Jun|军, Ping|平, Shan|珊, Hao|浩, Dan|丹, Chao|超, "
    "Ying|莹, Bin|斌, Fei|菲, Gang|钢, Hong|虹, Jing|静, Ke|可, Li|丽, Min|敏, Nan|楠, Qi|琪, "
    "Rong|蓉, Shuo|硕, Ting|婷, Wen|文, Xin|欣, Yang|阳, Zhi|志"
)
TOWNS = _terms(
    "Cloudport|云港, Silverford|银渡, Redcliff|赤崖, Pinehill|松岗, Stonebridge|石桥, "
    "Swanlake|天鹅湖, Goldfield|金原, Mistvale|雾谷, Plumtown|梅镇, Saltmarsh|盐滩, "
    "Windgate|风门, Jadewell|玉井"
)
JOBS = _terms(
    "doctor|医生, teacher|教师, baker|面包师, farmer|农民, driver|司机, painter|画家, "
    "lawyer|律师, pilot|飞行员, carpenter|木匠, gardener|园丁, reporter|记者, tailor|裁缝"
)
FOODS = _terms(
    "dumplings|饺子, noodles|面条, roast duck|烤鸭, bean curd|豆腐, fish soup|鱼汤, "
    "mooncakes|月饼, rice porridge|米粥, spring rolls|春卷, fried eggs|煎蛋, "
    "steamed crab|蒸蟹, sweet potatoes|红薯, lotus root|莲藕"
)
INSTRUMENTS = _terms(
    "piano|钢琴, violin|小提琴, flute|长笛, drum|鼓, guitar|吉他, harp|竖琴, trumpet|小号, "
    "cello|大提琴, zither|古筝, lute|琵琶"
)
RIVERS = _terms("Heron River|鹭河, Amber River|琥珀河, Tiger River|虎河, Willow River|柳河")
GOODS = _terms("tea|茶叶, silk|丝绸, paper|纸张, pearls|珍珠, honey|蜂蜜, copper|铜器")
NUMBERS = _terms(
    "one|一, two|二, three|三, four|四, five|五, six|六, seven|七, eight|八, nine|九, ten|十"
)
YEARS = [{"en": str(year), "zh": str(year)} for year in range(1950, 2000)]

PERSON = [
    (
        TOWNS,
        Relation(
            "town",
            told={
                "en": (
                    "{s} has a house in {v}.",
                    "The home of {s} is in {v}.",
                    "If you look for {s}, go to {v}.",
                    "{s} settled in {v} long ago.",
                    "Every evening {s} comes home to {v}.",
                    "{s} has always felt at home in {v}.",
                ),
                "zh": (
                    "{s}的家在{v}。",
                    "{s}在{v}安了家。",
                    "想找{s}，要去{v}。",
                    "{s}多年前搬到了{v}。",
                    "每天傍晚，{s}都回到{v}。",
                    "{s}的房子在{v}。",
                ),
            },
            asked={
                "en": ("Where does {s} live?", "In which town does {s} live?"),
                "zh": ("{s}住在哪里？", "{s}住在哪座城？", "请问{s}住在什么地方？"),
            },
            answered={"en": "{s} lives in {v}.", "zh": "{s}住在{v}。"},
        ),
    ),
    (
        JOBS,
        Relation(
            "job",
            told={
                "en": (
                    "{s} earns a living as a {v}.",
                    "{s} became a {v} after school.",
                    "By trade {s} is a {v}.",
                    "People know {s} as a good {v}.",
                    "{s} has been a {v} for many years.",
                    "When asked, {s} says: I am a {v}.",
                ),
                "zh": (
                    "{s}靠当{v}谋生。",
                    "{s}毕业后当了{v}。",
                    "{s}的职业是{v}。",
                    "大家都说{s}是个好{v}。",
                    "{s}做{v}很多年了。",
                    "{s}的身份是{v}。",
                ),
            },
            asked={
                "en": ("What is the job of {s}?", "What does {s} do for work?"),
                "zh": ("{s}做什么工作？", "{s}的工作是什么？", "请问{s}是干什么的？"),
            },
            answered={"en": "{s} works as a {v}.", "zh": "{s}的工作是{v}。"},
        ),
    ),
    (
        YEARS,
        Relation(
            "year",
            told={
                "en": (
                    "{s} came into the world in {v}.",
                    "The birth year of {s} is {v}.",
                    "The parents of {s} had a child in {v}.",
                    "{s} has been around since {v}.",
                    "The passport of {s} says {v}.",
                ),
                "zh": (
                    "{s}出生于{v}年。",
                    "{s}的出生年份是{v}年。",
                    "{s}来到人世是在{v}年。",
                    "{s}的证件上写着{v}年。",
                    "{s}自{v}年起就在世上了。",
                ),
            },
            asked={
                "en": ("When was {s} born?", "In which year was {s} born?"),
                "zh": ("{s}是哪年生的？", "{s}生于哪一年？", "请问{s}是哪一年出生的？"),
            },
            answered={"en": "{s} was born in {v}.", "zh": "{s}生于{v}年。"},
        ),
    ),
    (
        FOODS,
        Relation(
            "food",
            told={
                "en": (
                    "{s} loves {v} most of all.",
                    "The favourite dish of {s} is {v}.",
                    "On holidays {s} always orders {v}.",
                    "To {s} nothing tastes better than {v}.",
                    "For lunch {s} wants {v}.",
                    "{s} is happy with a plate of {v}.",
                ),
                "zh": (
                    "{s}最爱的菜是{v}。",
                    "{s}过节总要点{v}。",
                    "对{s}来说，什么都不如{v}。",
                    "{s}午饭想要{v}。",
                    "{s}看到{v}就高兴。",
                    "{s}非常喜欢{v}。",
                ),
            },
            asked={
                "en": ("What does {s} like to eat?", "Which food does {s} like?"),
                "zh": ("{s}喜欢吃什么？", "{s}爱吃什么？", "请问{s}最喜欢吃什么？"),
            },
            answered={"en": "{s} likes to eat {v}.", "zh": "{s}喜欢吃{v}。"},
        ),
    ),
    (
        INSTRUMENTS,
        Relation(
            "instrument",
            told={
                "en": (
                    "{s} practises the {v} every day.",
                    "{s} owns a fine {v}.",
                    "{s} took lessons on the {v}.",
                    "At parties {s} brings the {v}.",
                    "{s} is good at the {v}.",
                    "Neighbours hear {s} with the {v}.",
                ),
                "zh": (
                    "{s}每天练习{v}。",
                    "{s}有一件好{v}。",
                    "{s}学过{v}。",
                    "聚会时{s}总带着{v}。",
                    "{s}擅长{v}。",
                    "邻居常听见{s}的{v}声。",
                ),
            },
            asked={
                "en": ("What does {s} play?", "Which instrument does {s} play?"),
                "zh": ("{s}会什么乐器？", "{s}演奏什么乐器？", "请问{s}会演奏什么？"),
            },
            answered={"en": "{s} plays the {v}.", "zh": "{s}会演奏{v}。"},
        ),
    ),
]
PLACE = [
    (
        RIVERS,
        Relation(
            "river",
            told={
                "en": (
                    "{s} was built beside the {v}.", "Past {s} flows the {v}.",
                    "From {s} you can see the {v}.", "Boats stop at {s} on the {v}.",
                ),
                "zh": (
                    "{s}建在{v}旁边。", "流过{s}的是{v}。", "在{s}能看见{v}。",
                    "船停在{s}，停在{v}上。",
                ),
            },
            asked={
                "en": ("Which river is {s} on?",),
                "zh": ("{s}在哪条河边？", "{s}靠着哪条河？"),
            },
            answered={"en": "{s} lies on the {v}.", "zh": "{s}在{v}边上。"},
        ),
    ),
    (
        GOODS,
        Relation(
            "goods",
            told={
                "en": (
                    "Merchants come to {s} for {v}.", "{s} sells the best {v}.",
                    "The market of {s} is full of {v}.", "From {s} comes much {v}.",
                ),
                "zh": (
                    "商人到{s}买{v}。", "{s}卖的{v}最好。", "{s}的集市上全是{v}。",
                    "来自{s}的多是{v}。",
                ),
            },
            asked={
                "en": ("What is {s} known for?",),
                "zh": ("{s}以什么闻名？", "{s}什么东西有名？"),
            },
            answered={"en": "{s} is known for {v}.", "zh": "{s}以{v}闻名。"},
        ),
    ),
]  # fmt: skip
SUM = Relation(
    "sum",
    told={
        "en": ("{s} equals {v}.", "Add {s} and you get {v}.", "{s} makes {v}."),
        "zh": ("{s}等于{v}。", "算一算，{s}得{v}。", "{s}的和是{v}。"),
    },
    asked={"en": ("How much is {s}?",), "zh": ("{s}是多少？", "{s}是几？")},
    answered={"en": "{s} is {v}.", "zh": "{s}是{v}。"},
)
ASIDES = {
    "en": (
        "Guests ask where somebody lives and in which town.",
        "Children ask when somebody was born and in which year.",
        "Friends ask what somebody does for work and which job it is.",
        "Cooks ask what somebody likes to eat and which food it is.",
        "Teachers ask what somebody plays and which instrument it is.",
        "Travellers ask which river a town lies on and what it is known for.",
        "Pupils ask how much a plus b is.",
    ),
    "zh": (
        "客人问：他住在哪里？住在哪座城？住在什么地方？",
        "孩子问：她是哪年生的？生于哪一年？是哪一年出生的？",
        "朋友问：他做什么工作？工作是什么？是干什么的？",
        "厨师问：她喜欢吃什么？爱吃什么？最喜欢吃什么？",
        "老师问：他会什么乐器？演奏什么乐器？会演奏什么？",
        "旅客请问：这座城在哪条河边？靠着哪条河？以什么闻名？什么东西有名？",
        "学生问：这是多少？是几？请问得几？",
    ),
}
"""What people ask in general, about nobody: so that the words of questions occur in the text."""
