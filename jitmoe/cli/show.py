"""``jitmoe show``."""

from jitmoe.cli.options import ConfigOptions, takes_config
from jitmoe.jit import capability, render, toolchain
from jitmoe.jit.build import instance_key, template_headers
from jitmoe.plan.shapes import plan_kernels


@takes_config
def show(config: ConfigOptions) -> None:
    """Print the plan, keys and generated C++ of a config."""
    wanted = config.make()
    kernel_plan = plan_kernels(wanted, capability.resolve_isa(wanted.requested_isa))
    compiler, headers = toolchain.find_compiler(), template_headers()
    print(f"config    {wanted}\nisa       {kernel_plan.isa}\ncompiler  {compiler.identity}")
    for shape in kernel_plan.shapes:
        instance = render.render(shape)
        print(f"\nkernel    {shape.name}\nshape     {shape}\nkey       {instance_key(instance, compiler, headers)}\n")
        print(instance.text)
