"""Words of English that the cache may read as one another, and those that it must not: the tables behind ``normal`` and ``guards``.

Most of this makes two questions more alike, so every entry is a claim that no answer hangs on the difference. What is doubtful is left
out: a missing entry costs a hit, a wrong one a false answer. Nothing is learned and nothing is fetched; a reader can check each line.
"""

from __future__ import annotations

from collections.abc import Mapping


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _table(text: str) -> dict[str, str]:
    """``a=b c=d``: left is read as right; an underscore stands for a space."""
    pairs = (entry.split("=") for entry in text.split())
    return {left.replace("_", " "): right.replace("_", " ") for left, right in pairs}


# Words that mean something else with all letters capital.
CAPITALS = _words("""
us it who aids sad act cat ram car pin mac ice now am or in me hi ok pa ma oh ms mo ad pm as an at be by do go he if is la my no on so to
up we ai id et al sat gas lime imap bar sap sass less rest soap ant led map net nap pub san ski sow spa tip van bat cad dam den fat fed
hub mit cern nice pets oats start cob doe dod mad scar salt dare moo basic ada lisp perl ml sol pis pics dos var
""")

# Left of "=": how it is also written. British to American, by whole words where no ending says it.
SPELLINGS: Mapping[str, str] = _table("""
colour=color colours=colors coloured=colored colouring=coloring colourful=colorful favour=favor favours=favors favourite=favorite
favourites=favorites favourable=favorable flavour=flavor flavours=flavors flavoured=flavored honour=honor honours=honors honoured=honored
humour=humor labour=labor neighbour=neighbor neighbours=neighbors neighbourhood=neighborhood rumour=rumor rumours=rumors harbour=harbor
harbours=harbors behaviour=behavior behaviours=behaviors armour=armor odour=odor odours=odors vapour=vapor tumour=tumor tumours=tumors
parlour=parlor saviour=savior savour=savor splendour=splendor vigour=vigor endeavour=endeavor glamour=glamor candour=candor rigour=rigor
centre=center centres=centers theatre=theater theatres=theaters fibre=fiber fibres=fibers litre=liter litres=liters metre=meter
metres=meters kilometre=kilometer kilometres=kilometers centimetre=centimeter centimetres=centimeters millimetre=millimeter
millimetres=millimeters millilitre=milliliter millilitres=milliliters calibre=caliber sombre=somber spectre=specter meagre=meager
lustre=luster sabre=saber catalogue=catalog catalogues=catalogs dialogue=dialog dialogues=dialogs analogue=analog monologue=monolog
prologue=prolog epilogue=epilog defence=defense offence=offense licence=license licences=licenses pretence=pretense practise=practice
practising=practicing practised=practiced grey=gray greys=grays tyre=tire tyres=tires aluminium=aluminum aeroplane=airplane
aeroplanes=airplanes plough=plow mould=mold mouldy=moldy moulds=molds moult=molt smoulder=smolder sceptic=skeptic sceptical=skeptical
programme=program programmes=programs jewellery=jewelry pyjamas=pajamas moustache=mustache cosy=cozy sulphur=sulfur sulphate=sulfate
ageing=aging judgement=judgment acknowledgement=acknowledgment enrol=enroll enrolment=enrollment fulfil=fulfill fulfilment=fulfillment
instalment=installment instalments=installments skilful=skillful wilful=willful counsellor=counselor counsellors=counselors
councillor=councilor traveller=traveler travellers=travelers travelling=traveling travelled=traveled cancelling=canceling
cancelled=canceled cancelation=cancellation labelling=labeling labelled=labeled modelling=modeling modelled=modeled signalling=signaling
signalled=signaled levelling=leveling levelled=leveled fuelling=fueling fuelled=fueled tunnelling=tunneling channelling=channeling
quarrelling=quarreling marvellous=marvelous woollen=woolen focussed=focused focussing=focusing benefitted=benefited paediatric=pediatric
paediatrician=pediatrician anaesthetic=anesthetic anaesthesia=anesthesia anaemia=anemia anaemic=anemic leukaemia=leukemia
haemoglobin=hemoglobin diarrhoea=diarrhea oestrogen=estrogen foetus=fetus oesophagus=esophagus orthopaedic=orthopedic
encyclopaedia=encyclopedia mediaeval=medieval manoeuvre=maneuver manoeuvres=maneuvers archaeology=archeology artefact=artifact
artefacts=artifacts analyse=analyze analysed=analyzed analysing=analyzing paralyse=paralyze catalyse=catalyze doughnut=donut
doughnuts=donuts yoghurt=yogurt whilst=while amongst=among learnt=learned burnt=burned dreamt=dreamed spelt=spelled spoilt=spoiled
maths=math mathematics=math e-mail=email e-mails=emails wi-fi=wifi web_site=website web_sites=websites data_base=database
data_bases=databases log-in=login sign-up=signup set-up=setup back-up=backup health_care=healthcare smart_phone=smartphone
smart_phones=smartphones screen_shot=screenshot on-line=online off-line=offline per_cent=percent alright=okay ok=okay
""")
# Common misspellings: none of these is a word of its own.
MISSPELLINGS: Mapping[str, str] = _table("""
recieve=receive recieved=received recieving=receiving beleive=believe acheive=achieve seperate=separate seperated=separated
seperately=separately definately=definitely definatly=definitely defiantely=definitely adress=address adresses=addresses calender=calendar
calenders=calendars neccessary=necessary necesary=necessary accomodate=accommodate accomodation=accommodation acommodation=accommodation
occured=occurred occuring=occurring occurence=occurrence occurance=occurrence tommorow=tomorrow tommorrow=tomorrow tomorow=tomorrow
wierd=weird freind=friend freinds=friends enviroment=environment enviornment=environment goverment=government begining=beginning
writting=writing untill=until wich=which whcih=which teh=the hte=the adn=and taht=that thier=their becuase=because becasue=because
beacuse=because thsi=this wiht=with waht=what hwo=how grammer=grammar arguement=argument buisness=business bussiness=business
busines=business collegue=colleague comming=coming completly=completely concious=conscious dissapear=disappear dissappear=disappear
dissapoint=disappoint embarass=embarrass existance=existence experiance=experience foriegn=foreign fourty=forty garantee=guarantee
guarentee=guarantee gaurantee=guarantee happend=happened harrass=harass immediatly=immediately independant=independent
intresting=interesting interupt=interrupt knowlege=knowledge liason=liaison libary=library lisence=license maintainance=maintenance
maintenence=maintenance millenium=millennium mispell=misspell neice=niece noticable=noticeable ocasion=occasion occassion=occasion
paralel=parallel parliment=parliament persistant=persistent posession=possession prefered=preferred probaly=probably probly=probably
proffesional=professional profesional=professional pronounciation=pronunciation publically=publicly realy=really recomend=recommend
reccomend=recommend recommed=recommend refered=referred relevent=relevant religous=religious remeber=remember rember=remember
restarant=restaurant resturant=restaurant restaraunt=restaurant rythm=rhythm secratary=secretary sence=sense succesful=successful
successfull=successful sucessful=successful suprise=surprise temperture=temperature tempature=temperature therefor=therefore
threshhold=threshold tounge=tongue truely=truly unfortunatly=unfortunately usefull=useful vaccum=vacuum vegatable=vegetable
vehical=vehicle visable=visible wether=whether wheter=whether yesturday=yesterday passowrd=password pasword=password passwrod=password
passord=password acount=account accout=account acconut=account emial=email emal=email mesage=message messege=message managment=management
availible=available avaliable=available availabe=available anwser=answer awnser=answer aswer=answer quesiton=question qestion=question
explane=explain expain=explain diffrence=difference diference=difference differance=difference langauge=language languge=language
pyhton=python pyton=python fucntion=function funtion=function fuction=function retrun=return lenght=length widht=width heigth=height
hieght=height stirng=string pasage=passage cancle=cancel cancell=cancel subscripton=subscription subcription=subscription
delievery=delivery delivary=delivery shiping=shipping reciept=receipt recipt=receipt refound=refund transfering=transferring
updgrade=upgrade upgarde=upgrade instal=install unistall=uninstall donwload=download downlaod=download uplaod=upload verison=version
sofware=software compter=computer computor=computer caculate=calculate calcualte=calculate converstion=conversion tranlate=translate
transalte=translate summerize=summarize sumarize=summarize summarise=summarize plz=please pls=please plse=please thx=thanks thnx=thanks
tnx=thanks ur=your u=you abt=about hav=have wat=what wut=what thru=through tho=though cuz=because
""")
CONTRACTIONS: Mapping[str, str] = _table("""
can't=can_not cannot=can_not cant=can_not won't=will_not wont=will_not shan't=shall_not don't=do_not dont=do_not doesn't=does_not
doesnt=does_not didn't=did_not didnt=did_not isn't=is_not isnt=is_not aren't=are_not arent=are_not wasn't=was_not wasnt=was_not
weren't=were_not werent=were_not haven't=have_not havent=have_not hasn't=has_not hasnt=has_not hadn't=had_not couldn't=could_not
couldnt=could_not wouldn't=would_not wouldnt=would_not shouldn't=should_not shouldnt=should_not mustn't=must_not mightn't=might_not
needn't=need_not ain't=is_not i'm=i_am im=i_am you're=you_are youre=you_are we're=we_are they're=they_are theyre=they_are i've=i_have
ive=i_have you've=you_have we've=we_have they've=they_have i'll=i_will you'll=you_will we'll=we_will they'll=they_will he'll=he_will
she'll=she_will it'll=it_will i'd=i_would you'd=you_would we'd=we_would they'd=they_would what's=what_is whats=what_is where's=where_is
wheres=where_is who's=who_is whos=who_is how's=how_is hows=how_is when's=when_is why's=why_is it's=it_is that's=that_is thats=that_is
there's=there_is theres=there_is here's=here_is he's=he_is she's=she_is let's=let_us what're=what_are how're=how_are how'd=how_did
gonna=going_to wanna=want_to gotta=got_to gimme=give_me lemme=let_me dunno=do_not_know y'all=you_all
""")
CARDINALS: Mapping[str, int] = {
    word: number
    for number, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
        "nineteen".split()
    )
} | {word: 10 * number for number, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
SCALES: Mapping[str, int] = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "dozen": 12}
ORDINALS: Mapping[str, str] = _table("""
first=1st third=3rd fourth=4th fifth=5th sixth=6th seventh=7th eighth=8th ninth=9th tenth=10th eleventh=11th twelfth=12th thirteenth=13th
fourteenth=14th fifteenth=15th sixteenth=16th seventeenth=17th eighteenth=18th nineteenth=19th twentieth=20th
""")

# Words that stand for one another whatever the question: few do ("pick a lock" is not "choose a lock"). The first is written for all; verbs
# come with their regular forms.
VERB_SYNONYMS = ("buy purchase",)
NOUN_SYNONYMS = (
    *("photo photograph", "tv television", "fridge refrigerator", "phone telephone", "info information", "truck lorry", "gasoline petrol"),
    "flu influenza",
)
OTHER_SYNONYMS = ("bought purchased", "quickly rapidly", "maybe perhaps", "mandatory compulsory obligatory", "allowed permitted")
IRREGULAR_PLURALS: Mapping[str, str] = _table("""
children=child people=person men=man women=woman feet=foot teeth=tooth mice=mouse geese=goose oxen=ox leaves=leaf knives=knife wives=wife
lives=life wolves=wolf shelves=shelf halves=half loaves=loaf thieves=thief criteria=criterion phenomena=phenomenon crises=crisis
theses=thesis matrices=matrix vertices=vertex indices=index indexes=index cacti=cactus fungi=fungus
""")
# An s more is another word, not a plural.
NOT_PLURALS = _words("""
news glasses goods arms customs means pants shorts spirits manners savings series species windows teams sheets brains quarters airs ethics
physics economics politics statistics mathematics athletics mechanics graphics optics genetics dynamics acoustics classics briefs odds
damages rights
""")

# Real words that a slip of the pen would make of one another (found in a list of 100,000: an inner swap, or a double letter).
CONFUSABLES = _words("""
barely/barley barked/braked barking/braking belated/bleated bugled/bulged bugling/bulging carted/crated carting/crating carved/craved
carves/craves carving/craving carvings/cravings casual/causal casually/causally compiled/complied compiles/complies complaint/compliant
concerted/concreted coroner/crooner coroners/crooners creeps/crepes dairies/diaries direst/driest farmed/framed farmer/framer
farmers/framers farming/framing garter/grater garters/graters gilded/glided gilding/gliding gustier/gutsier infarction/infraction
marital/martial minuets/minutes parted/prated parting/prating pasties/patsies patios/patois perfect/prefect perfects/prefects
plaint/pliant pluses/pulses poises/posies repertoires/repertories retired/retried retires/retries rogues/rouges sacred/scared
salted/slated salting/slating salved/slaved salves/slaves shrieks/shrikes signed/singed signer/singer signers/singers signing/singing
silver/sliver silvers/slivers soldier/solider solitaires/solitaries thickest/thickset tilted/titled tilting/titling timbers/timbres
trailed/trialed trailing/trialing trails/trials united/untied unites/unties waiver/wavier angels/angles aliens/alines cervices/crevices
cavalry/calvary conversation/conservation conversations/conservations reversed/reserved adventures/adventuress canvases/canvasses
canvased/canvassed cartons/cartoons chaffing/chafing commandeer/commander corespondent/correspondent deadlines/deadliness deserts/desserts
discuses/discusses distills/distils dragons/dragoons griping/gripping gravelly/gravely needles/needless overate/overrate planing/planning
premises/premisses princes/princess privateer/privater reenters/renters riffling/rifling roosters/rosters saltines/saltiness
scaring/scarring scooping/scoping scraped/scrapped scraping/scrapping shaming/shamming shining/shinning sloping/slopping smoother/smother
sniping/snipping sparing/sparring spiting/spitting staring/starring striped/stripped striping/stripping timelines/timeliness
tiniest/tinniest twining/twinning bellying/belying
""")

FOREIGN: Mapping[str, frozenset[str]] = {
    "de": _words("""
der die das und ist nicht wie ich mein meine ein eine einen den dem mit auf für wo wann warum kann was sind zu von im wer es wird bitte
"""),
    "fr": _words("""
le la les des est et comment je mon ma un une du dans pour où quand pourquoi puis-je que quel quelle sont avec sur qui ne pas vous
"""),
    "es": _words("""
el los las es y cómo mi un una en para dónde cuándo por qué puedo que cuál son con está quién del no se como donde cuando
"""),
    "it": _words("""
il lo gli è e come mio mia un una di per dove quando perché posso che qual quale sono con chi non del della
"""),
    "pt": _words("""
o os as é e como meu minha um uma em para onde quando por posso que qual são com quem não do da está
"""),
    "nl": _words("""
de het een en hoe ik mijn niet waar wanneer waarom kan wat zijn met op voor wie van dit dat je
"""),
}
ENGLISH = _words("""
the a an is are was were do does did how what who whom whose where when why which can could should would will must may i my me you your we
our he she it they this that these those of in on at for to from with without by about and or not no if than as there be been have has had
please give tell show list write explain find make get use
""")
# Not put into the index of words: too many questions have them.
STOP_WORDS = ENGLISH | _words("""
so just very some any all also then into onto over under up down out off am us them his her its their much many let need want
""")
