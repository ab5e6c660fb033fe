"""Foreign files: transcoders of circuit-tracer, Gemma Scope, Llamascopium, SAELens, sparsify; graphs of Neuronpedia."""

from .circuit_tracer import export_circuit_tracer as export_circuit_tracer
from .circuit_tracer import import_circuit_tracer as import_circuit_tracer
from .importing import PROGRAMS as PROGRAMS
from .importing import SAMPLE as SAMPLE
from .importing import cached as cached
from .importing import import_transcoder as import_transcoder
from .importing import measured_nmse as measured_nmse
from .importing import open_foreign as open_foreign
from .neuronpedia import graph_to_neuronpedia as graph_to_neuronpedia
from .neuronpedia import slugified as slugified
from .neuronpedia import write_neuronpedia as write_neuronpedia
from .neuronpedia_read import check_neuronpedia as check_neuronpedia
from .neuronpedia_read import read_neuronpedia as read_neuronpedia
from .saelens import export_saelens as export_saelens
from .saelens import import_saelens as import_saelens
