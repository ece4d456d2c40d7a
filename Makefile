# darktrt: every stage is a file; `make help` lists the targets and variables.

MODEL     ?= yolov4-tiny
PRECISION ?= fp16
BATCH     ?= 1
OUT       ?= build
CFG       ?=
WEIGHTS   ?=
NAMES     ?=
DATA      ?=
DIST      ?= dist
JOBS      ?= 3
MAX_DROP  ?=
FORCE_INT8 ?=
CALIBRATE_ON ?=
EVAL      ?=
DETECTIONS ?=
HEAD      ?= nms
INPUT     ?= uint8
IMAGE_SIZES ?=
MISH      ?= auto
TENSORRT  ?= rtx
KIND      ?= python
FORM      ?= tensor
SERVER    ?=
PYTHON    ?= python3
VENV      ?= .venv
SM        ?=
NVCC      ?=
TENSORRT_INCLUDE ?=
TENSORRT_VERSION ?=
TENSORRT_OSS_URL ?=
TENSORRT_COMMIT ?=
SECONDS ?= 60

NAME := $(if $(CFG),$(basename $(notdir $(CFG))),$(MODEL))
SIZE ?= $(if $(CFG),,416)
DIR  := $(OUT)/$(NAME)
CFG_FILE     := $(or $(CFG),$(DIR)/$(MODEL).cfg)
WEIGHTS_FILE := $(if $(CFG),$(WEIGHTS),$(DIR)/$(MODEL).weights)
PLAN := $(DIR)/$(PRECISION).plan
CHECKED_PLAN := $(if $(wildcard /dev/nvidia0),$(PLAN))
DARKTRT := $(VENV)/bin/darktrt
STUBS := $(VENV)/stubs
LIBRARY := $(OUT)/libdarktrt_plugins.so
# full TensorRT gets the custom nodes from it
PLUGINS := $(if $(filter trt,$(TENSORRT)),$(if $(filter-out raw-native,$(HEAD)-$(MISH)),$(LIBRARY)))

CONVERT_OPTIONS := $(if $(SIZE),--size $(SIZE)) --batch $(BATCH) $(if $(NAMES),--names $(NAMES))
CALIB_OPTIONS   := $(DATA)
ENGINE_OPTIONS   = $(if $(PLUGINS),--plugins $(PLUGINS))
INT8_OPTIONS     = $(if $(ON_GPU),--calibrate-on gpu --data $(CALIB_DATA),--calibration $(DIR)/calibration.calib) \
    $(if $(MAX_DROP),--max-drop $(MAX_DROP) --eval $(EVAL_DATA)) $(if $(FORCE_INT8),--force-int8)
ON_GPU := $(filter gpu,$(CALIBRATE_ON))
SURGERY_OPTIONS := --head $(HEAD) --input $(INPUT) --mish $(MISH) $(if $(IMAGE_SIZES),--image-sizes $(IMAGE_SIZES))

REPOSITORY := $(OUT)/model_repository
MODEL_FILE := $(if $(filter trt,$(TENSORRT)),$(PLAN),$(DIR)/portable.onnx)

ifneq ($(CFG),)
ifeq ($(WEIGHTS),)
$(error CFG=$(CFG) needs WEIGHTS= too)
endif
endif

.DELETE_ON_ERROR:
.PHONY: help wheel engine plugins calib check report bench triton serve load surgery onnx fetch venv test fuzz lint docs clean always

help: ## list targets and variables
	@echo 'Targets:'
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1|\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{printf "%-12s %s\n", $$1, $$2}'
	@echo 'Variables, as they stand now:'
	@echo '  MODEL=$(MODEL)    a network of the zoo: yolov4-tiny or yolov4'
	@echo '  CFG=$(CFG) WEIGHTS=$(WEIGHTS) NAMES=$(NAMES)    a network of your own instead: darknet files and class names'
	@echo '  PRECISION=$(PRECISION)    fp16, fp32 or int8'
	@echo '  DATA=$(DATA)    images to calibrate INT8 on: folders, lists, COCO json files, patterns (without: samples, to try it)'
	@echo '  CALIBRATE_ON=$(CALIBRATE_ON)    gpu: the scales of TensorRT'"'"'s own calibration on DATA, with TENSORRT=trt'
	@echo '  FORCE_INT8=$(FORCE_INT8)    1: INT8 also where TensorRT finds FP16 faster, with TENSORRT=trt up to TensorRT 10'
	@echo '  MAX_DROP=$(MAX_DROP)    with int8, the largest loss of mAP, such as 0.005: the worst layers stay in FP16 until it holds'
	@echo '  EVAL=$(EVAL)    images to measure that, and the report, on: a COCO json with annotations, or darknet label files (without: DATA)'
	@echo '  DETECTIONS=$(DETECTIONS)    for report, detections of engines elsewhere: files of darktrt check map --save-detections'
	@echo '  SIZE=$(SIZE)    network input, 416 or WIDTHxHEIGHT (with CFG: the size in the cfg)'
	@echo '  BATCH=$(BATCH)    4 for a static batch, 1..8 for a dynamic one'
	@echo '  DIST=$(DIST)    where make wheel puts the wheel and the sdist'
	@echo '  JOBS=$(JOBS)    processes of make test; each needs some 3 GB of memory'
	@echo '  OUT=$(OUT)    results go to $(DIR)/'
	@echo '  HEAD=$(HEAD) INPUT=$(INPUT) MISH=$(MISH)    see darktrt surgery --help'
	@echo '  IMAGE_SIZES=$(IMAGE_SIZES)    with INPUT=image, smallest, usual and largest image: "32x32 1920x1080 4096x4096"'
	@echo '  TENSORRT=$(TENSORRT)    what to install: rtx (builds without a GPU) or trt (full TensorRT, needs an NVIDIA GPU)'
	@echo '  KIND=$(KIND) FORM=$(FORM)    for triton and serve, see darktrt serve repository --help (its --kind and --input)'
	@echo '  SERVER=$(SERVER)    for load, a server that runs already, as host:port, or several'
	@echo '  PYTHON=$(PYTHON) VENV=$(VENV)    interpreter and virtual environment'
	@echo '  SECONDS=$(SECONDS)    for fuzz, how long; about 150 cases a second and core'
	@echo '  SM=$(SM)    for plugins, compute capabilities such as "75 86 90" (without: those of the GPUs here, else the usual ones)'
	@echo '  NVCC=$(NVCC)    for plugins, the CUDA compiler (without: the one found)'
	@echo '  TENSORRT_INCLUDE=$(TENSORRT_INCLUDE)    for plugins, the folder of NvInfer.h (without: found in the system, else downloaded)'
	@echo '  TENSORRT_VERSION=$(TENSORRT_VERSION)    which headers those are (without: of the installed TensorRT, else those of the system, else 10.16)'
	@echo '  TENSORRT_OSS_URL=$(TENSORRT_OSS_URL)    where they are downloaded from, by git (without: from NVIDIA at GitHub)'
	@echo '  TENSORRT_COMMIT=$(TENSORRT_COMMIT)    the commit that the download must be (without: that of NVIDIA'"'"'s release)'

engine: $(PLAN) ## everything: get a network, convert, insert plugin nodes, build an engine
	@echo
	@echo 'Engine:   $(PLAN) (manifest: $(DIR)/$(PRECISION).json)'
	@$(if $(filter int8,$(PRECISION)),$(if $(ON_GPU),:,sed -n 's/^warning: */Scales:   /p' $(DIR)/calibration.txt))
	@echo 'Try it:   $(DARKTRT) detect docs/astronaut.jpg --model $(DIR)/portable.onnx -o out.jpg'
	@echo 'Look in:  $(DARKTRT) inspect $(PLAN)'

plugins: $(LIBRARY) ## compile the plugin library for full TensorRT: needs the CUDA toolkit
check: $(DIR)/portable.onnx $(CHECKED_PLAN) ## compare ONNX Runtime, and the engine where a GPU is, with PyTorch on DATA
	$(DARKTRT) check compare $(or $(DATA),docs) --cfg $(CFG_FILE) --weights $(WEIGHTS_FILE) --model $(DIR)/portable.onnx$(if \
	    $(CHECKED_PLAN), --plan $(PLAN) $(ENGINE_OPTIONS))

report: $(DIR)/portable.onnx $(DIR)/calibration.calib $(CHECKED_PLAN) ## a page about accuracy on EVAL: PyTorch, ONNX, FP16, INT8, engines
	$(DARKTRT) check report $(or $(EVAL_DATA),docs) --cfg $(CFG_FILE) --weights $(WEIGHTS_FILE) --model ONNX=$(DIR)/portable.onnx \
	    --simulate fp16,int8 --calibration $(DIR)/calibration.calib \
	    $(if $(CHECKED_PLAN),--plan $(PRECISION)=$(PLAN) $(ENGINE_OPTIONS)) \
	    $(DETECTIONS:%=--load-detections %) $(patsubst %,--bench %,$(wildcard $(DIR)/*-bench.json)) -o $(DIR)/report

bench: $(PLAN) ## time the engine on the GPU
	$(DARKTRT) bench $(PLAN) --batch $(subst .., ,$(BATCH)) --json $(DIR)/$(PRECISION)-bench.json $(ENGINE_OPTIONS)

triton: $(MODEL_FILE) | $(VENV)/.installed-serve ## put the ONNX file, or with TENSORRT=trt the engine, into a repository for Triton
	$(DARKTRT) serve repository $(MODEL_FILE) -o $(REPOSITORY) --kind $(KIND) --input $(FORM) $(ENGINE_OPTIONS)

serve: triton ## start a Triton server with that repository on this machine; Ctrl-C stops it
	$(DARKTRT) serve start $(REPOSITORY)

load: $(if $(SERVER),,triton) | $(VENV)/.installed-serve ## measure a Triton server under load: that of SERVER, or one started for it
	$(DARKTRT) load $(if $(SERVER),$(addprefix --server ,$(SERVER)),--repository $(REPOSITORY)) --json $(OUT)/load.json

calib: $(DIR)/calibration.calib ## choose INT8 scales on the images of DATA
surgery: $(DIR)/portable.onnx ## put plugin nodes into the ONNX file
onnx: $(DIR)/plain.onnx ## convert the darknet files to ONNX
fetch: $(if $(CFG),,$(WEIGHTS_FILE)) ## get the network's cfg, weights and class names
venv: $(VENV)/.installed-$(TENSORRT) ## set up the virtual environment

test: $(VENV)/.installed-dev ## run the tests, in JOBS processes
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

fuzz: $(VENV)/.installed-dev ## read damaged files of every kind, for SECONDS; what fails goes to tests/fuzz/corpus
	cd tests && $(abspath $(VENV))/bin/python -m fuzz --seconds $(SECONDS)

lint: $(VENV)/.installed-dev $(STUBS) ## run ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	MYPYPATH=$(STUBS) $(VENV)/bin/mypy

wheel: $(VENV)/.installed-dev ## build the wheel and the sdist into DIST
	$(VENV)/bin/python -m build --outdir $(DIST)

docs: $(VENV)/.installed-docs ## build the documentation as a site
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet --site-dir $(abspath $(OUT))/site
	@echo 'Site:     $(OUT)/site/index.html'

clean: ## remove results, not the virtual environment
	rm -rf $(OUT)

# --- the virtual environment; pip compiles the resize of images into vision/ ---

COMPILED := $(addprefix plugins/csrc/,fit_host.cpp fit.h half.h hd.h kernels.h)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo 'darktrt needs Python 3.10 or newer: make PYTHON=python3.12 ...'; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	    { rm -rf $(VENV); echo 'cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv'; exit 1; }

$(VENV)/.installed-%: pyproject.toml setup.py constraints.txt $(COMPILED) | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --disable-pip-version-check --no-compile -c constraints.txt -e '.[$*]'
	@$(VENV)/bin/python -m compileall -qq -j 0 $(VENV)/lib || true  # pip would on one core; some files are of other Pythons
	@touch $@

# TensorRT's types, without the TensorRT that the package asks for; what the generator of the stubs got wrong is mended
$(STUBS): constraints.txt | $(VENV)/bin/python
	@rm -rf $@
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt --target $@ tensorrt-stubs
	@sed -i 's/\bin: list/in_: list/; s/= None, channel_axis: int)/= None, channel_axis: int = 0)/' $@/tensorrt_bindings/tensorrt.pyi
	@touch $@

# --- the plugin library; its file changes only when its content does ---

PLUGINS_OPTIONS := $(if $(TENSORRT_VERSION),--tensorrt $(TENSORRT_VERSION)) $(if $(SM),--sm '$(SM)') $(if $(NVCC),--nvcc $(NVCC)) \
    $(if $(TENSORRT_INCLUDE),--include $(TENSORRT_INCLUDE))

$(LIBRARY): always | $(VENV)/.installed-$(TENSORRT)
	@mkdir -p $(OUT)
	$(DARKTRT) plugins $(PLUGINS_OPTIONS) -o $@

# --- the stages; each also depends on its options, kept in a file that changes only when they do ---

$(DIR):
	@mkdir -p $@

$(DIR)/%.options: always | $(DIR)
	@printf '%s\n' '$($*_OPTIONS)' | cmp -s - $@ || printf '%s\n' '$($*_OPTIONS)' > $@

$(DIR)/$(MODEL).weights: convert/zoo.py $(wildcard convert/data/*) | $(VENV)/.installed-$(TENSORRT) $(DIR)
	$(DARKTRT) fetch $(MODEL) -o $(DIR)
	@touch $@
$(DIR)/$(MODEL).cfg: $(DIR)/$(MODEL).weights ;

$(DIR)/plain.onnx: $(CFG_FILE) $(WEIGHTS_FILE) $(NAMES) $(DIR)/CONVERT.options darktrt/metadata.py $(wildcard convert/*.py) \
    | $(VENV)/.installed-$(TENSORRT)
	$(DARKTRT) convert $(CFG_FILE) $(WEIGHTS_FILE) $(CONVERT_OPTIONS) -o $@

$(DIR)/portable.onnx: $(DIR)/plain.onnx $(DIR)/SURGERY.options plugins/ops.py plugins/bodies.py $(wildcard surgery/*.py)
	$(DARKTRT) surgery $< $(SURGERY_OPTIONS) -o $@

# without DATA those of the last time, which its options file keeps
CALIB_DATA = $(or $(DATA),$(shell cat $(DIR)/CALIB.options 2>/dev/null))

$(DIR)/calibration.calib: $(DIR)/portable.onnx $(if $(DATA),$(DIR)/CALIB.options) $(wildcard calib/*.py)
	$(DARKTRT) calib run $< $(CALIB_DATA) -o $@

EVAL_DATA = $(or $(EVAL),$(CALIB_DATA))

$(DIR)/int8.plan: $(DIR)/portable.onnx $(if $(ON_GPU),,$(DIR)/calibration.calib) $(DIR)/INT8.options $(PLUGINS) \
    $(wildcard engine/*.py) $(if $(MAX_DROP),$(wildcard check/*.py))
	@test -z '$(MAX_DROP)' || test -n '$(EVAL_DATA)' || { echo 'MAX_DROP is measured on images: make ... EVAL=val.json'; exit 1; }
	@test -z '$(ON_GPU)' || test -n '$(CALIB_DATA)' || { echo 'TensorRT calibrates on images: make ... DATA=path/to/images'; exit 1; }
	$(DARKTRT) engine $< --precision int8 $(INT8_OPTIONS) $(ENGINE_OPTIONS) -o $@

$(DIR)/%.plan: $(DIR)/portable.onnx $(PLUGINS) $(wildcard engine/*.py)
	$(DARKTRT) engine $< --precision $* $(ENGINE_OPTIONS) -o $@
