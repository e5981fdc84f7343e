// SPDX-License-Identifier: GPL-2.0

//! C types and constants that the `kernel` crate's bindings do not cover, made by bindgen.

#![allow(
    clippy::all,
    dead_code,
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unreachable_pub,
    unsafe_op_in_unsafe_fn,
    improper_ctypes,
    clippy::cast_lossless,
    clippy::ref_as_ptr,
    clippy::ptr_as_ptr,
    clippy::undocumented_unsafe_blocks
)]

use kernel::bindings::{file, file_operations, list_head, mm_struct, mutex, page};
use kernel::ffi;

// What bindgen calls C's types of these names.
type bool_ = bool;
type u16_ = u16;
type u32_ = u32;
type u64_ = u64;

include!(env!("RVISOR_BINDINGS"));
