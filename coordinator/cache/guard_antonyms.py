"""Words whose exchange turns a question round, by kind: opposites, quantifiers, modality, negation, question words, units, dates,
relations.

``guards`` refuses any word that stands in one question only. These lists say *why* it was refused, and they hold where a tolerance
(another spelling, an inflection, a synonym) would let a pair pass: a pair of opposites never does.
"""

from __future__ import annotations

_OPPOSITES = """
on/off enable/disable enabled/disabled activate/deactivate activated/deactivated open/close open/closed open/shut opened/closed
lock/unlock locked/unlocked install/uninstall installed/uninstalled connect/disconnect connected/disconnected mount/unmount plug/unplug
subscribe/unsubscribe follow/unfollow mute/unmute pin/unpin block/unblock freeze/unfreeze zip/unzip pack/unpack wrap/unwrap load/unload
fold/unfold do/undo undo/redo tie/untie buy/sell bought/sold buyer/seller purchase/sell lend/borrow lender/borrower loan/borrow rent/let
tenant/landlord lease/own increase/decrease increasing/decreasing raise/lower raise/reduce increase/reduce grow/shrink rise/fall
rising/falling up/down upper/lower expand/collapse expand/contract enlarge/reduce lengthen/shorten widen/narrow strengthen/weaken
maximize/minimize maximum/minimum max/min most/least more/less more/fewer many/few much/little before/after pre/post previous/next
last/next last/first earlier/later early/late earliest/latest begin/end start/stop start/end start/finish started/stopped beginning/end
opening/closing pause/resume continue/stop continue/quit accept/reject accept/refuse accept/decline approve/reject approve/deny
approved/rejected agree/disagree confirm/deny confirm/cancel allow/forbid allow/deny allow/block allowed/forbidden allowed/prohibited
permit/forbid permitted/prohibited legal/illegal lawful/unlawful include/exclude including/excluding included/excluded inclusive/exclusive
add/remove add/delete add/subtract add/deduct insert/remove insert/delete attach/detach plus/minus multiply/divide append/prepend
push/pull push/pop enter/exit enter/leave entrance/exit arrive/depart arrival/departure arrivals/departures come/go join/leave join/split
merge/split combine/separate import/export imported/exported upload/download encrypt/decrypt encode/decode compress/decompress
compress/extract serialize/deserialize send/receive sent/received sender/recipient sender/receiver give/take give/receive put/take
save/spend save/delete save/discard save/lose win/lose won/lost winner/loser succeed/fail success/failure pass/fail gain/lose profit/loss
asset/liability assets/liabilities credit/debit income/expense income/expenses revenue/expenses surplus/deficit deposit/withdraw
deposit/withdrawal borrow/repay hire/fire hired/fired employ/dismiss employer/employee employed/unemployed teacher/student teach/learn
doctor/patient parent/child ancestor/descendant predecessor/successor husband/wife man/woman men/women male/female boy/girl brother/sister
mother/father son/daughter uncle/aunt nephew/niece king/queen his/her he/she him/her my/your mine/yours our/your big/small large/small
bigger/smaller larger/smaller biggest/smallest largest/smallest huge/tiny tall/short taller/shorter tallest/shortest long/short
longer/shorter longest/shortest high/low higher/lower highest/lowest deep/shallow deeper/shallower deepest/shallowest wide/narrow
wider/narrower widest/narrowest thick/thin thicker/thinner fat/thin heavy/light heavier/lighter heaviest/lightest fast/slow faster/slower
fastest/slowest quick/slow quickly/slowly speed/slow accelerate/decelerate accelerate/brake old/new older/newer oldest/newest old/young
older/younger oldest/youngest ancient/modern hot/cold hotter/colder hottest/coldest warm/cool warmer/cooler warmest/coolest heat/cool
heating/cooling boil/freeze melt/freeze wet/dry moist/dry humid/arid hard/soft harder/softer hard/easy harder/easier hardest/easiest
difficult/easy simple/complex simple/complicated strong/weak stronger/weaker strongest/weakest rich/poor richer/poorer richest/poorest
cheap/expensive cheaper/pricier cheapest/priciest good/bad better/worse best/worst good/evil right/wrong correct/incorrect correct/wrong
true/false valid/invalid truth/lie honest/dishonest safe/unsafe safe/dangerous safer/riskier secure/insecure healthy/unhealthy
healthy/sick clean/dirty full/empty fill/empty loud/quiet noisy/quiet bright/dark light/dark black/white day/night morning/evening
morning/night am/pm summer/winter spring/autumn spring/fall today/tomorrow today/yesterday yesterday/tomorrow now/then past/future
north/south northern/southern east/west eastern/western left/right top/bottom front/back front/rear above/below over/under inside/outside
in/out into/out indoor/outdoor indoors/outdoors inner/outer internal/external interior/exterior inbound/outbound incoming/outgoing
input/output inputs/outputs near/far nearest/farthest nearest/furthest close/far here/there to/from with/without for/against pro/con
pros/cons advantage/disadvantage advantages/disadvantages benefit/drawback benefits/drawbacks strength/weakness strengths/weaknesses
positive/negative optimist/pessimist optimistic/pessimistic like/dislike love/hate likes/hates happy/sad happy/unhappy friend/enemy
ally/enemy peace/war attack/defend attack/defense offense/defense offensive/defensive help/harm help/hinder help/hurt helpful/harmful
harmless/harmful protect/harm cause/prevent causes/prevents cause/effect cure/cause improve/worsen improves/worsens build/destroy
create/destroy create/delete construct/demolish show/hide shown/hidden visible/hidden visible/invisible appear/disappear reveal/conceal
public/private open-source/proprietary free/paid free/busy online/offline remote/local manual/automatic manually/automatically
synchronous/asynchronous static/dynamic mutable/immutable signed/unsigned lossy/lossless wired/wireless prefix/suffix header/footer
row/column rows/columns horizontal/vertical horizontally/vertically portrait/landscape ascending/descending ascend/descend
forward/backward forward/back forwards/backwards clockwise/counterclockwise client/server master/slave source/target source/destination
origin/destination question/answer supply/demand wholesale/retail fixed/variable fixed/floating gross/net long-term/short-term
permanent/temporary permanently/temporarily lend/repay major/minor majority/minority common/rare common/uncommon usual/unusual
normal/abnormal regular/irregular even/odd single/multiple singular/plural married/single married/divorced married/unmarried alive/dead
live/die living/dead birth/death born/died life/death arrive/leave wake/sleep awake/asleep sit/stand walk/run eat/drink hungry/full
sweet/sour sweet/bitter sweet/salty raw/cooked fresh/stale fresh/frozen acid/base acidic/alkaline solid/liquid liquid/gas
endothermic/exothermic hyper/hypo hypertension/hypotension hyperthermia/hypothermia hyperglycemia/hypoglycemia systolic/diastolic
artery/vein arteries/veins inhale/exhale contract/relax absorb/emit attract/repel present/absent presence/absence possible/impossible
able/unable likely/unlikely certain/uncertain known/unknown necessary/unnecessary needed/unneeded required/optional mandatory/optional
complete/incomplete finished/unfinished read/unread read/write seen/unseen used/unused paid/unpaid fiction/nonfiction smoker/nonsmoker
alcoholic/nonalcoholic refundable/nonrefundable contagious/noncontagious linear/nonlinear formal/informal polite/rude direct/indirect
active/passive active/inactive active/dormant equal/unequal same/different similar/different identical/different similarity/difference
similarities/differences increase/drop gain/drop rise/drop climb/descend climb/fall ahead/behind front/behind lead/follow leader/follower
guilty/innocent victim/attacker plaintiff/defendant prosecution/defense capitalism/communism liberal/conservative democracy/dictatorship
theory/practice abstract/concrete general/specific global/local domestic/foreign domestic/international urban/rural native/foreign
natural/artificial real/fake original/copy genuine/counterfeit professional/amateur expert/novice expert/beginner beginner/advanced
senior/junior adult/child upstairs/downstairs uphill/downhill upstream/downstream upgrade/downgrade uptime/downtime upvote/downvote
overweight/underweight overestimate/underestimate overpaid/underpaid sunrise/sunset dawn/dusk ebb/flow inflation/deflation boom/bust
bull/bear bullish/bearish optimism/pessimism trust/distrust respect/disrespect obey/disobey appear/vanish encourage/discourage
widow/widower host/guest hero/villain saint/sinner virtue/vice heaven/hell blessing/curse praise/criticize reward/punish reward/penalty
temporary/indefinite wax/wane toxic/nontoxic edible/inedible mature/immature fertile/infertile sane/insane visible/unseen
logical/illogical
"""
OPPOSITES: frozenset[frozenset[str]] = frozenset(frozenset(pair.split("/")) for pair in _OPPOSITES.split())


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


NEGATIONS = _words("""
not no never without nor neither none nobody nothing nowhere except excluding unless instead hardly barely scarcely seldom lacking lack
lacks cannot non un isn't minus besides fails fail avoid stop refuse
""")
# Put before a word these make its opposite or its lack: "non-contagious", "uncommon".
NEGATIVE_PREFIXES = ("un", "in", "im", "il", "ir", "dis", "non", "mis", "anti", "de", "counter")
QUANTIFIERS = _words("""
all some any every each both either most many few several only just half twice once enough plenty lots more less fewer least much little
whole entire part partly mostly another other others none neither no a_few a_little a_lot single multiple exactly about almost nearly over
under
""")
MODALS = _words("""
must may might can could should shall will would ought need have always never often sometimes usually rarely seldom ever still yet already
possibly probably certainly definitely maybe allowed required able necessary is are was were did had been
""")
QUESTIONS = _words("who whom whose what which when where why how howto howmuch howmany howlong howoften if whether can")
UNITS = _words("""
kilometer meter centimeter millimeter mile yard foot feet inch acre hectare kilogram kg gram g milligram mg ounce oz pound lb ton tonne
carat stone liter milliliter ml gallon pint quart cup tablespoon teaspoon second minute hour day week month year decade century km m cm mm
mi ft celsius fahrenheit kelvin degree % percent dollar euro yen franc cent usd eur gbp byte bit kb mb gb tb watt kilowatt kw volt amp
ampere calorie joule hertz mph kmh knot pascal bar psi
""")
DATES = _words("""
monday tuesday wednesday thursday friday saturday sunday january february march april may june july august september october november
december jan feb mar apr jun jul aug sep sept oct nov dec today tomorrow yesterday tonight morning evening afternoon night noon midnight
weekend weekday spring summer autumn fall winter christmas easter am pm daily weekly monthly yearly annually next last this ago century
decade
""")
RELATIONS = _words("""
from to into onto in on at by with of for about over under above below between among through across along around behind beside beyond near
inside outside against before after during since until than as per via toward towards out off up down and or but
""")
PRONOUNS = _words("i me my mine you your yours he him his she her hers it its we us our ours they them their theirs this that these those")
LANGUAGES = _words("""
english german french spanish italian portuguese dutch swedish norwegian danish finnish polish czech slovak hungarian romanian bulgarian
greek turkish russian ukrainian arabic hebrew persian hindi urdu bengali tamil chinese mandarin cantonese japanese korean vietnamese thai
indonesian malay swahili latin irish welsh catalan basque croatian serbian esperanto
""")
