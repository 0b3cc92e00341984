# What CI runs (.ci/run), one by one. Everything uses the Python of the active environment.
.PHONY: style quality types test test-slow mutations docs npm browser

style:  ## Format the code and repair what can be repaired
	ruff format .
	ruff check --fix .

quality:  ## Check format and code
	ruff format --check .
	ruff check .

types:  ## Check type hints
	mypy

test:  ## Everything that needs neither weights nor a GPU, on all cores
	pytest -n auto --dist worksteal

test-slow:  ## What takes minutes, needs released weights, or a GPU
	pytest -m "slow or gpu"

mutations:  ## Deliberate errors in the whole package, each of which a test must notice; takes a while
	python tests/mutations/run_mutations.py

docs:  ## The documentation as a site, in build/docs; a warning is an error
	python -m sphinx -W --keep-going -q -b html docs build/docs

npm:  ## onnxruntime-web by the lock file, in build/npm
	mkdir -p build/npm
	cp docs/browser/package.json docs/browser/package-lock.json build/npm
	npm ci --ignore-scripts --no-audit --no-fund --prefix build/npm

browser: npm  ## The page that draws in the browser, in build/docs/draw; needs npm and the extra `onnx`
	rm -rf build/docs/draw
	mkdir -p build/docs/draw
	cp docs/browser/*.js docs/browser/*.html build/docs/draw
	cp build/npm/node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs build/docs/draw
	gzip -9 -n -c build/npm/node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded.wasm > build/docs/draw/ort-wasm-simd-threaded.wasm.gz
	python -c "from cogview_pipelines.cli import app; app()" export --format onnx --output build/docs/draw/model
