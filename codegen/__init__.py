"""From the Kernel value to Triton: text (`cast`, `gemm`), a file that imports by itself (`module`), a launch (`launch`).

emit(kernel, sizes, target, schedule) -> Source      readable Triton and the function that launches it
load(source) -> module                               written aside under its digest, then imported
launch.install()                                     the `lowprec::` operators on CUDA tensors
"""

assert __name__ == "lpcompile.codegen", "import it as lpcompile.codegen, not as codegen"
