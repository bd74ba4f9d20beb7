//! An unmodified QEMU/KVM or QEMU/TCG virtual machine, over QMP and an external pager.
