"""Words of the other families: opposites in three languages, and the words that make names with initials."""

LANGUAGES = ("en", "fr", "es")

# One pair a line: the two sides in English, French, Spanish. No spelling occurs twice, in any language.
OPPOSITES = [
    tuple(tuple(side.split("/")) for side in line.split())
    for line in """\
big/grand/grande small/petit/pequeño
hot/chaud/caliente cold/froid/frío
fast/rapide/rápido slow/lent/lento
old/vieux/viejo young/jeune/joven
rich/riche/rico poor/pauvre/pobre
strong/fort/fuerte weak/faible/débil
high/haut/alto low/bas/bajo
heavy/lourd/pesado light/léger/ligero
full/plein/lleno empty/vide/vacío
open/ouvert/abierto closed/fermé/cerrado
clean/propre/limpio dirty/sale/sucio
dry/sec/seco wet/mouillé/mojado
hard/dur/duro soft/mou/blando
good/bon/bueno bad/mauvais/malo
beautiful/beau/hermoso ugly/laid/feo
true/vrai/verdadero false/faux/falso
day/jour/día night/nuit/noche
black/noir/negro white/blanc/blanco
first/premier/primero last/dernier/último
inside/dedans/dentro outside/dehors/fuera
above/dessus/encima below/dessous/debajo
left/gauche/izquierda right/droite/derecha
early/tôt/temprano late/tard/tarde
near/près/cerca far/loin/lejos
always/toujours/siempre never/jamais/nunca
more/plus/más less/moins/menos
love/amour/amor hate/haine/odio
war/guerre/guerra peace/paix/paz
life/vie/vida death/mort/muerte
beginning/début/inicio end/fin/final
north/nord/norte south/sud/sur
buy/acheter/comprar sell/vendre/vender
give/donner/dar take/prendre/tomar
win/gagner/ganar lose/perdre/perder
friend/ami/amigo enemy/ennemi/enemigo
victory/victoire/victoria defeat/défaite/derrota
wide/large/ancho narrow/étroit/estrecho
thick/épais/grueso thin/mince/delgado
sweet/doux/dulce bitter/amer/amargo
rough/rugueux/áspero smooth/lisse/liso
brave/courageux/valiente cowardly/lâche/cobarde
healthy/sain/sano sick/malade/enfermo
loud/bruyant/ruidoso quiet/silencieux/silencioso
easy/facile/fácil difficult/difficile/difícil
bright/clair/claro dark/sombre/oscuro
polite/poli/cortés rude/impoli/grosero
equal/égal/igual different/différent/diferente
enter/entrer/entrar leave/sortir/salir
push/pousser/empujar pull/tirer/tirar
accept/accepter/aceptar refuse/refuser/rechazar
success/succès/éxito failure/échec/fracaso
summer/été/verano winter/hiver/invierno
""".splitlines()
]

OPPOSITE_OF = {
    "en": "the opposite of {word} is",
    "fr": "le contraire de {word} est",
    "es": "lo contrario de {word} es",
}
TRANSLATION_OF = {
    "en": "the English word for {word} is",
    "fr": "le mot français pour {word} est",
    "es": "la palabra española para {word} es",
}

# A name is one word of each list; its initials are the first letters.
NAME_WORDS = tuple(
    line.split()
    for line in """\
American British Central Danish Eastern Federal Global Hungarian International Joint Korean Latin Maritime National \
Open Pacific Queensland Royal Scottish Tropical United Volcanic Western Young Zurich
Arctic Biology Climate Defence Energy Forest Geology Health Industry Justice Kinetics Language Music Nuclear Oxygen \
Physics Quantum Research Science Trade Urban Vaccine Weather Youth Zoology
Agency Bureau Council Department Exchange Foundation Group Hospital Institute Journal Kitchen Laboratory Museum \
Network Office Program Quarterly Registry Service Trust Union Venture Workshop Yearbook Zone
""".splitlines()
)
