// The Python module _native. Its interface is that of kernels/native.py.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "dispatch.h"

using namespace native;

namespace {

PyObject *py_attend(PyObject *, PyObject *positional) {
  const char *name, *bytes;
  Py_ssize_t size;
  unsigned long long pool;
  int threads;
  if (!PyArg_ParseTuple(positional, "sKiy#", &name, &pool, &threads, &bytes, &size)) return nullptr;
  Call call{};
  if (size != sizeof(Arguments))
    return PyErr_Format(PyExc_ValueError, "the call has %zd bytes, expected %zd", size,
                        sizeof(Arguments));
  std::memcpy(static_cast<Arguments *>(&call), bytes, sizeof(Arguments));
  Work *work = nullptr;
  for (const InstructionSet &set : instruction_sets())
    if (set.supported && !std::strcmp(set.name, name)) work = set.work;
  if (!work) return PyErr_Format(PyExc_ValueError, "instruction set %s is not supported", name);
  bool done;
  Py_BEGIN_ALLOW_THREADS;
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
    {"attend", py_attend, METH_VARARGS,
     "attend(instructions, pool, threads, arguments): run the kernel on `Arguments` of common.h,\n"
     "given as bytes; with gradients: backward pass."},
    {"supported", py_supported, METH_NOARGS,
     "Names of the instruction sets that this processor has, best first."},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, methods,
                      nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&module); }
