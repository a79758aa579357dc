"""Words that decide how much of a question's writing the exact key forgets (``normal.normalise``): each entry keeps questions apart.

A needless entry costs a hit, a missing one may cost a false answer, so these lists are generous.
"""

from __future__ import annotations

import re


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Names that are also words: they keep a capital but at the beginning of a sentence, where nobody can tell.
CAPITONYMS = _words("""
abbey abby access acer acorn acre act actix adobe affirm afghan airflow airtable alexa ali alibaba alien aliens alpine amazon amber amd
amish ampere anchor android angel angle angular anna ant anthem apache apex apple april aqua arc arch arena arrival arrow art asana ash
aspen aspire astro athena atlas atom audible august aurora autumn avalanche avatar avenger avengers axis axum azure babel backbone
bacon baker bamboo barb barbie bard barry baseball basic basil bastion bath bay bazel beam bean beanstalk bear beats beck becquerel
bedrock bee beetle bell belle bench berry beth bezos bill billy bing birch bishop bison bitten blackberry blackbird blair blake blanch
blanche blaze blazer blender blink block blogger blossom bluebird bob bobby bolt bonanza bond bones booth bootstrap boss
bottle bowie bowling box brackets brad bradford brandy brave breeze brew bridge bronco brook brownie bubble buck bucks bud buffalo
bullet bumble bun bundle burger burns bush buster butler buzz bytes cactus calendar camel camino canary candice candy canvas carat
caravan carbon cardinal cards caribou carl carmine carol carpenter carter cascade cash cassandra cat catholic celery celeste cello
celsius chad chai chance chandler chapel chapman charger chargers charity charm chase cherry chester chevy chi chile chili china chip
chocolate christian christmas chrome chrysler chuck circle cisco citizen civic civilization claire clark claude clay cleveland cliff
clipper clojure cloud cloudflare clover clubhouse clueless coach cob cobalt coco coda coffee cohere coke colby cole collier cologne
colt comet compass concord confluence congress conifer conservative constance continental cooper copilot coral cork corona corsair
couch couchbase cougar coulomb courage court cove coward craft crane creed cricket crimson crocs cross crow crown crunch crystal cuba
cube cucumber cuphead curry cursor curve cyan cyclone cygnet cypress dagster daisy dale dallas danish dart dash dask datadog dawn deal
dean dear debian delight deliverance dell delphi delta democrat den denim denny depot descript desktop destiny dexter diablo diamond
dice dickens diesel discord discover discovery disney dixie doc docker docs dodge dodgers dolly dolphin dolphins domino dominos don
doom dory dot dottie dove drafts drake dreamer drew drive drop dropbox druid drummer duke dunk duo duolingo dusk dutch dyson eagle
eagles earl earnest earth east easter echo eclipse ecto eden edge edison elastic elder electron elixir elm emacs ember emerald encore
encounter endeavour engage english ensign enterprise epic equator ernest ernie escort essence eternal etsy eve everest evernote
everyday evolution exact excel expedia expedition explorer express expression fable faith falcon falcons fallout fancy faraday fargate
fargo fastify fate fates father faye fedora felicity fern fiat fiber fiddle fidel fidelity fiesta figma finch finder finish finn
firebase firefly firefox fisher fitbit flask fleece fleet fletcher flicker flink flint flo flora florence flossie flow flutter flux
focus ford forest forester fortran foster fox frame franc franca frances francs frank franklin freebird freedom french friday friends
frost frozen fuji fuse fusion galaxy gap gardener gardner garland garnet garrison gates gateway gatsby gay gem gemini gene genesis
genie georgia german gherkin ghost giant giants gill gin ginger git gizmo glacier glade gladiator glider globe gloria glory glue gnome
go god gold golf gordon grace gradle grafana graham grail grammarly grant graph grass gravy grease greece greek grep grid griffin grok
groovy groupon grove grub guardian guernsey guinea gulf gulp gunner gus guy hack hades hadoop hailey hale hall halo hamburger hammer
hanami hank hapi happy harbor harbour harmony harp harrow harry harvest harvey haskell haven hawk hawking hawks hazel heat heath
heather heathers heaven hedge helium helm henna henry herald herb hermes hermit hero heroes heroku hertz hex hickory hispanic hive
holly home homer honey hood hooker hoover hope horizon hornet house hub hubspot hudson hugging hugh hugo hull hulu hummer hunt hunter
hyacinth hyde hydra hydrogen hyper hyperion icon ideal impact impulse inception indeed indigo inn insight inspire instant intel
intercom interstellar irene iris irish iron italian ivory ivy jack jade jaguar jaguars jake jam jan jane japan japanese jar jasmine
jasper java jaws jay jays jazz jean jeans jenkins jenny jersey jest jet jets jewel jewish jill jim job jobs jock jockey joe joey jolly
jordan josh joules journey joy judge juice julia july jumper june jungle juniper junkers juno jupiter justice jute kafka kale karma
kate kay kelvin ken kent kerry keynote kibana kindle kinesis king kings kit kite kitty kiwi knight knights knockout koa kodi kong
kotlin krill labor labour lacy lad lake lamb lambda lancaster lance landmark lane lantern lara lark laser latin laurel law lays leaf
lean leap lee legion lego lemon lemonade lent leo lesbian less lester lex lexus liberal liberty libra lice lift lightning lightroom
lightsail lily lima limbo lime lincoln linden link links lion lions lisp lit liver llama lobby logan logic loom lord lotus louse love
lucia lucky luigi lulu luna lush lyft lynx lyric mac mace macintosh madeira madison magenta magic magnet mail malt malta mandarin
mandela mandrake mango manila maple maps march marge maria marian marigold marina mark marker marks marlin mars marsh marshal marshall
martin marvel mary mask mason master match matilda matt maud maven maverick mavericks max maxim may maya measure medium meet melba
melody melon memento memo mercedes merchant mercury mercy merit merlin merry messages messenger meta metal meteor metro mickey
midjourney midway mike miles mill miller mills minecraft miner minerva mini mint miracle mirage miro mistral misty mitt mix mobile
mocha mole molly monday monopoly monster monzo moon moor moose moss mother motion mountain mouse mozilla mulan muse musk mustang mystic
myth nancy nano nat native neil nelly nelson neon neptune nest net netflix netscape newark newman newton nexus nice nick nickel niger
nike nile nim nimbus ninja nirvana noble node noel nomad nook noon norm norse north norway notes notion nova november nuke numbers
nutmeg nutshell nuxt oak oasis oath obsidian ocean octave october octopus odyssey office ohm oil okay olive oliver olympus omega onion
onyx oozie opal opera oracle orange orbit orchid oreo orient origin oriole orion orlean osprey otter outback outlaw outlook overture
overwatch owl oxford oxygen pacer pacers pacific paddy page pages paige paint palm pam panda pandas pandora panther panthers paradise
paragon parallels paris parish park parker parrot parson parsons pascal pat patch patience patriot patriots patron patty paul payday
peach peacock pearce pearl pebble peg peggy pelican pendulum penguin penguins penny pepper pepsi percy periscope perl perplexity perry
persian phantom phil philip phillips philly phoenix photos photoshop pi pie piers pig pigeon pike pilot pine pinterest pioneer piper
pirate pirates pistons pitt pius pixel pixie plain planet plasma plateau play playwright plum pluto pod poe poet polars pole poles
polish pollock polly polo pony pope poppy port portal porter postman potter prairie praise pratt preact precious prefect premiere
presto prey price prime prince princess prism private pro procreate progress prolog promise prophet providence prudence psycho puck
pulsar puma puppet puppeteer pyramid python quad quake quaker quark quart quartz quebec queen queens quest quick quicken quicktime
quill quince quiver rabbit radar radius rage raiders rail rails rain rainbow raleigh ram rams ranch random ranger rangers raptors raven
ravens ray raymond razor react reader reading realm reason rebel reddit redshift redwood reebok reed reef reese regal regent reid
rekognition reliance remedy remix render replicate republic republican resolve revel revolution rex rhodes rich rick ring rings river
rob robin robinhood robust rocket rockets rocky rod rodeo roger roku rolex roller roma roman romance root rosa rosary rose rosemary
rosie rover roy royal royals ruby rudy ruff rugby runway rush russell russian rust rusty ryder rye saber sable safari saffron sage
sagemaker sahara saint saints salem salesforce sally salmon salt samba samson samuel samza sandwich sandy sanic sap sapphire satellite
saturday saturn savage saw sawyer scala scamp scheme scot scotch scots scottish scout scouts scratch scream scribe sea seal sears
season seat segment selenium senate sentinel sentra sentry september sequoia serena serenity shade shadow shark sharks shaw sheets
shell shelly sherry shield shiloh shine shopping shore sidekick sidney siemens sienna sierra sievert signal silicon silk silver sinatra
singer siri sketch skip sky skype slack slate slav sleepy slim sling smalltalk smart smith snap snapchat snapple snickers snow snowball
snowflake snowy sol solaris solid solo sonata sonic sonnet sonos sony soul south spaces spaniel spanish spanner spark sparks spartan
spectrum sphinx spider spike splash split splunk spot spotify spree spring springs sprint sprite spur spurs square squarespace squid
stability stack staples star starbucks stars stata steam steel steelers stella stellaris stephen sterling stew stimulus stoic stone
storm strand strata stray streamer stripe struts stu stuart studio sublime sue suede sugar suit suits summer summit sun sunday sunny
sunrise sunset superior superman supra surface surge svelte swallow swan swede sweet swift swiss switch sylvan symphony synergy tableau
tabloid tad tailwind talent tangier tango tanner target tasks tatum taurus taylor teal teams ted teddy teflon telegram temple tender
terra terraform terraria terry tesla thai thanksgiving thatcher theta thistle thor thread threads thunder thunderbird thursday tick
tide tiger tigers tile tim timber timberland times timothy tinder tiny titan titanic titanium titans tito toast tom tommy toni topaz
torch tornado tory toucan touchstone tower trace tracy trail transformer transformers travis trello tribune trident trinity triton
triumph trotter troy trump truth tucker tudor tuesday tulip tundra tupperware turbo turk turkey turner turquoise twilight twin twins
twitch twitter tyler typescript uber ubuntu ultra umber unicorn union unity unix unreal uranus urban usher vagrant val vale valentine
valor valve van vandal vanguard vanilla vault vector vega velvet venice venmo venture venus vera verge vernon vertex vertigo vespa
victor victoria victory viking vikings vim vince vinci vine viola violet viper virgin virgo virtue visa vision vista viva viz vlad
vodka vogue void volga volt voodoo voyager vue vulcan wade walker wall wallet walt wanda ward warden warp warren warrior warriors wasp
watt watts wave waves waze weaver web webb wednesday wells welsh wendy west wheeler whig whirlpool whisper wight wiki wild wilder will
william willow windows wire wireless wise wish wizards wolf wolverine wonder wood woods woody woolf woolworth word wordpress workday
worth wrangler wren wright xbox xerox yahoo yale yams yankee yankees yelp yeti york yorker young yum zapier zelle zen zendesk zenith
zephyr zest zig zinc zip zippo zodiac zone zoom zulu
""")

# Acronyms that are also words: a text all in capitals that has one of them is left as it is. Not those that every text has (IS, IN, DO).
ACRONYM_WORDS = _words("""
ace act add ads aid aids aim ana ant apt arc ark arm asap asp ass atom ban bar bart base bat bids bit bits bond boss bot brick bud bus
cab cad cam camp cap caps car care cart cash cat cats cern chip chips clam clap cob cod cop cops core cows crab cram crisp cult cure
dad dam dare dart dash date deal den dice dim dip dips dns doe dos dot dove ear ears east ego elf elisa emu era eras eta face fact fad
faq fast fat fed fema fica fin fire fit flash flip flops foil form fort gain gap gas gate gem glass gnu goal god grace grub gum gut
hack ham hat help hen hep hip hit hub hug ice icon idea imp ink ion ira ire iris isis it jam jar jet kiss lab lame lamp lan lap laser
last lead leap led leo less lid lime lip lisp list lot lox lust mac mad maid map maps mass mast mat max mesh mia mice mid mint mips
miss mit mob mode mom moo moon mop mud nah nap nasa nat navy neat nest net nets nice nix nod node nosh now nut nuts oar oats odd opal
oral orb pac pack pact pad pain pal pals pan pants pap pass past pat path paw peak peg pen pep pet pets pic pie pig pin pins pip pit
plan plot pod poe pop pops port pot prep pro pub pulse push rad raf rag raid rail rain ram ramp ran rap rat rats raw ray real rec rem
rep rest rib rid rip rise risk road rob rod rom root ros rot rug rum safe sag sal salt sam san sap sat saw scan scar scat scuba seal
search sec see self set sets shape sharp ship sic sim sin sip sir ski sky slam slap slim slip smart smash snap snow soap sob sod sole
son sonar sop sox spa span spark spin split spot star start stem step stop strips sun swan swap swat swift swot tab tap tar tart tax
tea team teams tee ten tic tide tim tin tips tote tram trap tree tri trim trip twain una unit us usher vast vat via vim vip vista wan
war warp wasp wave web wet who win wish wolf wop yam yap zap zip
""")

# Of letters, not of what they mean: every letter and every space of such a text may count.
LETTER_WORDS = re.compile(
    r"\b(?:(?:en|de)cod\w*|base ?(?:16|32|58|64|85)|(?:un)?escap(?:e|ed|ing)|url-?encod\w*|"
    r"md ?[245]|sha(?:-?\d+)?|hash\w*|checksums?|digest|hmac|"
    r"hex\w*|crc\w*|binary|octal|ascii|unicode|utf-?(?:8|16|32)?|bytes?|(?:upper|lower|title|camel|snake|kebab|sentence|mixed)[ -]?cas\w*|"
    r"capitals?[ -]+(?:letters?|case)|(?:all|in|small|big) caps|capitali[sz]\w*|cases?|(?:mis)?spel(?:l|ls|led|ling|lings|lt)|letters?|"
    r"characters?|chars?|vowels?|consonants?|syllables?|alphabet\w*|punctuat\w*|spac(?:e|es|ing)|white ?spaces?|lines?|newlines?|tabs?|"
    r"indent\w*|anagrams?|revers(?:e|ed|es|ing)|backwards?|palindrom\w*|regex\w*|regular expressions?|passphrases?|"
    r"rot-?\d+|caesar|vigen\w+|cipher\w*|(?:en|de)crypt\w*|morse|braille|acronyms?|abbreviat\w*|initials|typos?|verbatim|"
    r"substrings?|how (?:many|long) (?:\w+ ){0,2}(?:words?|texts?|sentences?)|"
    r"case-?(?:in)?sensitiv\w*)\b",
    re.IGNORECASE,
)
# A password is a text, unless the question is what to do about one's own.
PASSWORD = re.compile(r"\bpasswords?\b", re.IGNORECASE)
OWN_PASSWORD = re.compile(
    r"\b(?:reset|change|forg[eo]t|forgotten|recover|restore|update|lost)\b(?: \w+){0,3}\s+"
    r"password(?:,?\s+(?:please|thanks|thank you|again|now))*[?.! ]*$",
    re.IGNORECASE,
)
