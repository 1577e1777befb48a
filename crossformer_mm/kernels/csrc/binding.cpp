// The Python module _native. Its interface is that of kernels/native.py.
#include <Python.h>

#include "dispatch.h"

using namespace native;

namespace {

// Takes its arguments by name.
PyObject *py_attend(PyObject *, PyObject *positional, PyObject *named) {
  static const char *names[] = {
      "instructions", "pool", "threads", "dtype", "qkv", "table", "out", "norms", "batch",
      "height", "width", "heads", "dim", "table_rows", "table_columns", "rows", "columns", "scale",
      "grad_out", "grad_qkv", "grad_table", nullptr};
  const char *name;
  unsigned long long pool, qkv, table, out, norms, grad_out = 0, grad_qkv = 0, grad_table = 0;
  int threads, dtype;
  long long batch, height, width, heads, dim, table_rows, table_columns;
  long long row[3], column[3];
  float scale;
  if (!PyArg_ParseTupleAndKeywords(
          positional, named, "sKiiKKKKLLLLLLL(LLL)(LLL)f|KKK", const_cast<char **>(names), &name,
          &pool, &threads, &dtype, &qkv, &table, &out, &norms, &batch, &height, &width, &heads,
          &dim, &table_rows, &table_columns, &row[0], &row[1], &row[2], &column[0], &column[1],
          &column[2], &scale, &grad_out, &grad_qkv, &grad_table))
    return nullptr;
  Work *work = nullptr;
  for (const InstructionSet &set : instruction_sets())
    if (set.supported && !std::strcmp(set.name, name)) work = set.work;
  if (!work) return PyErr_Format(PyExc_ValueError, "instruction set %s is not supported", name);
  bool done;
  Py_BEGIN_ALLOW_THREADS;
  Call call{static_cast<DType>(dtype), batch, height, width, heads, dim, table_rows, table_columns,
            scale, reinterpret_cast<const char *>(qkv), reinterpret_cast<const float *>(table),
            reinterpret_cast<char *>(out), reinterpret_cast<float *>(norms),
            reinterpret_cast<const char *>(grad_out), reinterpret_cast<char *>(grad_qkv),
            reinterpret_cast<float *>(grad_table), runs_of(height, row[0], row[1], row[2]),
            runs_of(width, column[0], column[1], column[2])};
  done = attend(call, work, reinterpret_cast<Pool *>(pool), threads);
  Py_END_ALLOW_THREADS;
  if (!done) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

PyObject *py_supported(PyObject *, PyObject *) {
  PyObject *names = PyList_New(0);
  for (const InstructionSet &set : instruction_sets()) {
    PyObject *name = names && set.supported ? PyUnicode_FromString(set.name) : nullptr;
    if (name) PyList_Append(names, name);
    Py_XDECREF(name);
  }
  return names;
}

PyMethodDef methods[] = {
    {"attend", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(py_attend)),
     METH_VARARGS | METH_KEYWORDS,
     "attend(instructions, pool, threads, dtype, qkv, table, out, norms, batch, height, width,\n"
     "heads, dim, table_rows, table_columns, rows, columns, scale, grad_out=0, grad_qkv=0,\n"
     "grad_table=0): arrays are addresses of contiguous numbers; with gradients: backward pass."},
    {"supported", py_supported, METH_NOARGS,
     "Names of the instruction sets that this processor has, best first."},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, methods,
                      nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&module); }
