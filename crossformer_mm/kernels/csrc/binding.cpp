// The Python module _native. What calls it: kernels/*native.py.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "dispatch.h"

using namespace native;

namespace {

// Parses (instructions, pool, threads, arguments) and runs a call.
template <class Arguments, class Calls>
PyObject *run(PyObject *positional, bool (*kernel)(Calls &, const InstructionSet &, Pool *, int)) {
  const char *name, *bytes;
  Py_ssize_t size;
  unsigned long long pool;
  int threads;
  if (!PyArg_ParseTuple(positional, "sKiy#", &name, &pool, &threads, &bytes, &size)) return nullptr;
  Calls call{};
  if (size != sizeof(Arguments))
    return PyErr_Format(PyExc_ValueError, "the call has %zd bytes, expected %zd", size,
                        sizeof(Arguments));
  std::memcpy(static_cast<Arguments *>(&call), bytes, sizeof(Arguments));
  const InstructionSet *found = nullptr;
  for (const InstructionSet &set : instruction_sets())
    if (set.supported && !std::strcmp(set.name, name)) found = &set;
  if (!found) return PyErr_Format(PyExc_ValueError, "instruction set %s is not supported", name);
  bool done;
  Py_BEGIN_ALLOW_THREADS;
  done = kernel(call, *found, reinterpret_cast<Pool *>(pool), threads);
  Py_END_ALLOW_THREADS;
  if (!done) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

PyObject *py_attend(PyObject *, PyObject *positional) {
  return run<Arguments>(positional, attend);
}

PyObject *py_compute_bias(PyObject *, PyObject *positional) {
  return run<BiasArguments>(positional, compute_bias);
}

PyObject *py_compute_weight_gradient(PyObject *, PyObject *positional) {
  return run<WeightArguments>(positional, compute_weight_gradient);
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
    {"attend", py_attend, METH_VARARGS,
     "attend(instructions, pool, threads, arguments): run the kernel on `Arguments` of common.h,\n"
     "given as bytes; with gradients: backward pass."},
    {"compute_bias", py_compute_bias, METH_VARARGS, "The same on `BiasArguments`."},
    {"compute_weight_gradient", py_compute_weight_gradient, METH_VARARGS,
     "The same on `WeightArguments`."},
    {"supported", py_supported, METH_NOARGS,
     "Names of the instruction sets that this processor has, best first."},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, methods,
                      nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&module); }
