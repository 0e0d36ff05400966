"""A plugin for g++ by which a precompiled header holds the templates that its functions use.

g++ instantiates them at the end of a file, and writes a precompiled header before that: each file
that takes the header instantiates them anew, which is most of the time it compiles. At
:data:`END`, the end of such a header, the plugin has that done before the header is written, by
g++'s own function. For a template, that is as good a point of instantiation as the end of the
file ([temp.point]), and g++ has always written instances so: those of functions whose return type
is deduced, and of constexpr ones. The g++ that takes the header needs no plugin.

The plugin declares the few functions it needs, since g++'s own headers for plugins are seldom
installed. Another g++ may lack one of them: then it does not load, and g++ fails.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Sequence
from pathlib import Path

END = "extern int jitops_end_of_header;\n"
_SAYS = "jitops: instantiated"
_SOURCE = (
    r"""
union tree_node;
extern "C" {
__attribute__((visibility("default"))) int plugin_is_GPL_compatible;
int get_named_event_id(const char*, int);
void register_callback(const char*, int, void (*)(void*, void*), void*);
long write(int, const void*, unsigned long);
}
const char* decl_as_string(tree_node*, int);
void instantiate_pending_templates(int);

static void declared(void* declaration, void*) {
  static bool done;
  if (done || !declaration) return;
  const char* name = decl_as_string(static_cast<tree_node*>(declaration), 0);
  if (!name || __builtin_strcmp(name, "jitops_end_of_header") != 0) return;
  done = true;
  instantiate_pending_templates(0);
  static const char said[] = "SAYS\n";
  if (write(2, said, sizeof said - 1) < 0) return;
}

extern "C" __attribute__((visibility("default"))) int plugin_init(void*, void*) {
  int event = get_named_event_id("PLUGIN_FINISH_DECL", 0);
  if (event < 0) return 1;
  register_callback("jitops", event, declared, nullptr);
  return 0;
}
"""
).replace("SAYS", _SAYS)
VERSION = hashlib.sha256((END + _SOURCE).encode()).hexdigest()[:16]
_FLAGS = ("-std=c++11", "-O1", "-shared", "-fPIC", "-nostdlib", "-fno-exceptions", "-fno-rtti")


def flags(compiler: Sequence[str], folder: Path) -> list[str]:
    """Those that have g++ load the plugin, compiled in ``folder``.

    Raises:
        OSError, subprocess.SubprocessError: it does not compile.
    """
    source, plugin = folder / "instantiate.cpp", folder / "instantiate.so"
    source.write_text(_SOURCE)
    subprocess.run(
        [*compiler, *_FLAGS, str(source), "-o", str(plugin)], check=True, capture_output=True
    )
    return [f"-fplugin={plugin}"]


def happened(errors: str) -> bool:
    """Whether the plugin did its work, by what g++ wrote to stderr."""
    return _SAYS in errors
