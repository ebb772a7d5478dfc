"""Our own training examples beside the real ones: written comments, comments composed from parts, and small talk.

None of the lines of ``datasets/ad_comments.jsonl`` is here, so that the bundled dataset stays a fair trial.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

WRITTEN = Path(__file__).parent / "own_comments.txt"

PARTS = {
    "topic": "song|video|comic|chapter|episode|movie|album|scene|story|clip|trailer|cover|drawing|ending|intro|remix|tutorial|lyrics",
    "praise": "love it|amazing|so good|beautiful|a masterpiece|underrated|great|awesome|perfect|still fresh|so funny|brilliant|epic",
    "moan": "boring|too loud|overrated|a bit slow|not for me|confusing|rushed|weird|too short|disappointing|out of sync",
    "who": "my sister|my dad|my friend|the singer|the author|the director|the main character|the villain|everyone in class|the drummer",
    "when": "in 2015|last night|every day|after work|since I was a kid|on the bus|right now|in the morning|again and again",
    "n": "3|5|10|12|20|50|100|250|500|1000|5000|9999",
    "money": "$50|$200|$500|$3000|100 dollars|20 euros|1,000 pounds|5k",
    "app": "@cash_king|@anna_fx|@best_trader|@vip_support|@promo77|@luckyman",
    "site": "www.superdeals.example|http://win-now.example/a1|https://cheapstuff.example|bit.ly/x7Yq2|get-rich.example|https://tube.example/watch?v=QzR1|http://www.facebook.example/page",
    "thing": "shirts|beats|followers|gift cards|sneakers|accounts|coins|pills|tickets|phones|skins|courses|headphones",
    "chan": "channel|page|profile|blog|stream|music page|youtube channel|facebook page",
    "zt": "漫画|视频|这首歌|这一集|动画|电影|剧情|画面|配音|结尾|开头|主角|评论区|教程|片尾曲|小说",
    "zp": "太好看了|绝了|好感动|很用心|百看不厌|笑死我了|看哭了|真不错|封神|很有意思|太帅了|意犹未尽",
    "zm": "有点无聊|节奏太慢|没看懂|一般般|不太喜欢|烂尾了|声音太小|太短了|逻辑不通|画崩了",
    "zw": "我妹妹|我同学|作者|导演|女主|男主|反派|我爸|朋友|老师|隔壁班的人",
    "zn": "三|五|十|二十|一百|两百|五百|一千|3|8|30|100|888",
    "wx": "微信 abc12345|微信号 xiaomei66|V信 lucky2023|VX：hao5566|薇信 wangzhuan8|微 qiang168",
    "qq": "QQ 12345678|扣扣 87654321|QQ群 55667788|群号 998811|企鹅 1122334455",
    "zs": "www.kanpian.example|http://manhua.example/free|haokan.example|xs.example/123|点击头像主页链接",
    "zg": "会员|皮肤|球鞋|减肥药|手机|面膜|账号|点卡|流量卡|手办|课程|口红|茶叶|资料",
    "za": "漫画大全|看书神器|追剧宝|爱看阅读|免费小说王|极速影院|赚钱宝|红包群|彩票助手",
    "zx": "加|联系|扫码加|私信|滴滴|咨询|找我要",
}  # fmt: skip

HAM = """
this {topic} is {praise}|{praise}!!|who is watching this {when}?|{who} showed me this {topic} and it is {praise}
I listen to this {topic} {when}|the {topic} was {moan} but the {topic} is {praise}|{moan}... I expected more from this {topic}
why does {who} look so sad here|anyone here {when}?|{n}:{n} best part of the {topic}|I can't stop laughing at {who}
{who} would have loved this {topic}|does anybody know the name of the {topic} at {n}:{n}?|this {topic} never gets old
{n} million views, well deserved|the {topic} made me cry {when}|I miss the old {topic}s|not gonna lie, the {topic} is {moan}
love this {topic} <3|lol {who} at {n}:{n}|this {topic} is {praise} and the {topic} too|{who} said the {topic} is {moan}, I disagree
please make more {topic}s like this|when is the next {topic} coming out?|I have watched this {n} times|{topic} of the year
my favourite {topic} {when}|thank you for this {topic}, it helped me {when}|the {topic} in the background is {praise}
I don't understand the {topic}, can someone explain?|{who} is {praise} in this|haha {praise}|omg {praise} :)|wow just wow
don't click those links, they are scams|I hate the spam under this {topic}|people who advertise here are {moan}
I read the book before the {topic} and it is {praise}|where can I buy the {topic} legally?|the app version of the {topic} is {moan}
{zt}{zp}|{zt}{zm}|{zw}推荐我看的，{zp}|第{zn}话{zp}|{zt}真的{zp}，就是{zt}{zm}|什么时候更新啊|{zp}！！|求{zt}的名字|等了{zn}天终于更新了
{zw}也太惨了吧|我看了{zn}遍还是{zp}|为什么{zw}要这样做|这{zt}是谁画的，{zp}|{zt}比原作好|感觉{zt}{zm}，希望下次改进
小时候就看过{zt}|{zw}的表情笑死|今天又来看{zt}了|第{zn}分钟那里{zp}|不要剧透啊|{zw}什么时候出场|有没有类似的{zt}推荐
买了正版支持{zw}|{zt}的翻译有点问题|{zp}，比上一季好多了|看完{zt}睡不着|{zw}说{zt}{zm}，我不同意|哈哈哈哈{zp}
别加那些微信，都是骗子|评论区广告好多，烦|楼上发链接的是骗人的|举报了，又是卖{zg}的广告|以前被卖{zg}的骗过，大家小心
请问{zt}在哪里买正版|APP里看{zt}老是卡|微信公众号上好像没有这一话|加油，期待下一集|打卡第{zn}天|谁懂啊，{zw}{zp}
"""

SPAM = """
check out my {chan} please|subscribe to my {chan} for {topic}s|hey guys I make {topic}s, visit my {chan}|sub to me and I sub back
I sell {thing} for {money}, write to {app}|earn {money} a day from home, contact {app} on telegram|get free {thing} at {site}
win {money} now {site}|buy {thing} cheap at {site}|watch the full {topic} for free here {site}|{site} best {thing} online
my new {topic} is on my {chan}, give it a listen|help me reach {n} subscribers please|like and share my {chan} {site}
I made {money} last week thanks to {app}, message on whatsapp|{n}% off {thing} with code SAVE{n} at {site}
free {thing}!!! only today {site}|new {topic} on my {chan}, support a small artist|follow me on instagram {app}
download the {topic} here: {site}|casino bonus {money} for new players, {site}|I do {topic}s on my {chan}, drop a like
need {thing}? text me, fast delivery|join our group {site} for daily {thing}|vote for {who} here {site}|{site}
whoever likes this {topic} should see the {topic} on my {chan}|cheap {thing}, original quality, ask {app}
loan of {money} in one hour, apply at {site}|invest {money} and get {n} times more, ask {app}|use my invite code {n} and get {money}
please watch my {topic}, I worked {n} hours on it, it is on my {chan}|follow my {chan} and win {thing}|we are hiring, {money} per day, contact {app}
read all chapters early at {site}|lose {n} kilos with these {thing}, order at {site}|our shop has the same {thing}, {site}
{zx}{wx}，{zg}便宜出|{wx}，{zt}全集打包|日赚{zn}元，{zx}{wx}|兼职日结{zn}元，{zx}{qq}|{qq}，进群免费领{zg}|免费看{zt} {zs}
下载{za}，全部{zt}免费|打开{zs}就能看完整版|{zg}{zn}元包邮，{zx}{wx}|代充{zg}，八折，{zx}{qq}|注册送{zn}元 {zs}
我的主页有更多{zt}，求关注|互粉互赞，关注必回|本店{zg}打折，搜店名{za}|{zt}资源{zx}{wx}|{za}APP看{zt}还能赚钱，邀请码{zn}
棋牌平台首充送{zn}，{zs}|贷款秒到账，{zx}{wx}|教你在家赚钱，月入{zn}万，{zx}{qq}|出售{zg}，价格便宜，{zx}|招代理卖{zg}，{zx}{wx}
恭喜您中奖{zn}元，点击{zs}领取|美女直播间等你，{zs}|看福利点我头像|专业办证，{zx}{qq}|股票内幕，{zx}{wx}拉你进群
求大家关注我的频道，讲{zt}的|帮忙给我{zw}投票，{zs}|我在做{zt}解说，求订阅|全网{zg}最低价，{zx}{qq}|扫码领{zg}，名额有限
{za}，应用商店搜索下载|想学赚钱的{zx}{wx}|无删减版{zt}在{zs}|{zg}代购，正品保证，{zx}{wx}|快递招刷单员，{zn}元一单，{zx}{qq}
"""


def templates(text: str) -> list[str]:
    return [part.strip() for line in text.strip().splitlines() for part in line.split("|") if part.strip()]


CHOICES = {name: text.split("|") for name, text in PARTS.items()}
HAM_TEMPLATES, SPAM_TEMPLATES = templates(HAM), templates(SPAM)

#: What people type to try a model: English, then Chinese.
QUESTIONS = """
hello|hi|hi there|hey|good morning|who are you?|what are you?|what can you do?|help|test|tell me a joke|write a poem|thanks
how do I cook {q}?|what is {q}?|explain {q} to a child|why is {q} important?|write a story about {q}|summarize {q}
translate {q} into French|give me three facts about {q}|what is the difference between {q} and {q}?|how does {q} work?
write a program for {q}|2 + 2 = ?|what is the capital of {q}|recommend a book about {q}|list five kinds of {q}
"""

QUESTIONS_ZH = """
你好|您好|在吗|早上好|你是谁？|你叫什么名字|你会什么？|帮助|测试|讲个笑话吧|写一首诗|谢谢
什么是{c}？|{c}是什么意思|请解释{c}|如何学习{c}？|怎么做{c}|{c}有什么用？|{c}和{c}有什么区别？|{c}的原理是什么？|{c}的优点有哪些？
{c}有哪些种类？|介绍一下{c}|写一篇关于{c}的文章|{c}的未来会怎样？|推荐一本关于{c}的书|为什么{c}很重要？|{c}的作用有哪些？|如何选择{c}？
"""

SUBJECTS = {
    "q": "rice|gravity|machine learning|the sea|a computer|France|chess|history|music|photosynthesis|a database|money|the moon"
    "|a neural network|tea|sleep|inflation|Python|a rainbow|football|vaccines|steel|the internet|bees|encryption",
    "c": "面条|引力|历史|音乐|大海|计算机|围棋|神经网络|数据结构|算法|编程|睡眠|茶|经济|月亮|操作系统|网络安全|区块链|物理|英语|云服务"
    "|咖啡|摄影|天气|加密|软件|模型|统计|健康|写作|前端|测试方法|容器|缓存|索引|搜索|芯片|卫星|显卡|气候|语言",
}  # fmt: skip

SYSTEMS = ("", "", "", "You are a helpful assistant.", "You are a poet.", "Answer briefly.", "你是一个有用的助手。", "请用中文回答。")


def written() -> list[tuple[str, bool]]:
    """The comments of ``own_comments.txt`` and whether each is an advertisement."""
    lines = WRITTEN.read_text(encoding="utf-8").splitlines()
    return [(line[2:].strip(), line[0] == "+") for line in lines if line[:2] in ("+ ", "- ")]


def filled(template: str, choices: dict[str, list[str]], rng: random.Random) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: rng.choice(choices[match[1]]), template)


def composed(rng: random.Random) -> tuple[str, bool]:
    """One comment made of parts, and whether it is an advertisement."""
    is_ad = rng.random() < 0.5
    return filled(rng.choice(SPAM_TEMPLATES if is_ad else HAM_TEMPLATES), CHOICES, rng), is_ad


def small_talk(rng: random.Random) -> tuple[str, str, bool]:
    """A system prompt, often empty, a prompt that is no comment, and whether it is Chinese."""
    chinese = rng.random() < 0.5
    text = filled(rng.choice(TALK_ZH if chinese else TALK), SUBJECT_CHOICES, rng)
    if not chinese and rng.random() < 0.3:
        text = text.capitalize()
    return rng.choice(SYSTEMS), text, chinese


TALK, TALK_ZH = templates(QUESTIONS), templates(QUESTIONS_ZH)
SUBJECT_CHOICES = {name: text.split("|") for name, text in SUBJECTS.items()}

#: Signs of an advertisement; how many a comment shows decides how sure the wanted score is.
SIGNS = (
    "http", "www", ".com", ".example", "subscribe", "check out", "channel", "free", "$", "follow", "click", "link", "code",
    "whatsapp", "telegram", "微信", "qq", "扣扣", "加v", "群", "链接", "免费", "下载", "私信", "主页", "关注", "兼职", "日赚",
)  # fmt: skip


def score(comment: str, is_ad: bool) -> int:
    """0 to 2 for a comment that is none, 3 to 5 for an advertisement, by the signs that it shows."""
    signs = sum(sign in comment.lower() for sign in SIGNS)
    return min(3 + signs, 5) if is_ad else min(signs, 2)


def noise(rng: random.Random) -> str:
    """Text that means nothing: people post that too, and an answer must be an answer even then."""
    signs = rng.choice(("░▒▓█", "┃┏┓┗┛━", "xX_-*", "<>/br ", "😂🔥❤", "asdfghjkl", "!?.", "の々ヽ～", "0123456789ABCDEF;~"))
    return "".join(rng.choice(signs) for _ in range(rng.randint(1, 60)))


def varied(comment: str, rng: random.Random) -> str:
    """The comment in another guise that keeps its meaning: the sets are small, and words matter more than spelling."""
    if rng.random() < 0.3:
        comment = re.sub(r"\d", lambda _: str(rng.randrange(10)), comment)
    if rng.random() < 0.25:
        words = comment.split(" ")
        comment = " ".join(word for word in words if rng.random() > 0.1) or comment
    if rng.random() < 0.1 and len(comment) > 8:
        at = rng.randrange(len(comment))
        comment = comment[:at] + comment[at + 1 :]
    guise = rng.random()
    if guise < 0.12:
        comment = comment.lower()
    elif guise < 0.15:
        comment = comment.upper()
    if rng.random() < 0.1:
        comment += rng.choice(("!", "!!!", "...", " :)", "~", "。", "！", "😂", "❤", "?", "."))
    if rng.random() < 0.02:
        comment = f"{comment} {noise(rng)}"
    return comment
