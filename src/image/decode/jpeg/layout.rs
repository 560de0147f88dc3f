//! What is used of libjpeg's own structures, version 6.2 of its interface; fields are named and ordered as in C.
//!
//! `build.rs` includes this file too: it lets the C compiler compare each number in it with the headers of the very
//! library that is linked. Nothing else of libjpeg is described anywhere.
#![allow(non_snake_case, non_upper_case_globals, dead_code)]

use std::ffi::{c_char, c_double, c_int, c_long, c_uint, c_void};

/// A structure as it is described here: what `build.rs` compares.
pub struct Mirror {
    /// How C calls the type.
    pub c: &'static str,
    /// Of a structure that is described to its end.
    pub size: Option<usize>,
    /// Name, offset and size.
    pub fields: &'static [(&'static str, usize, usize)],
}

macro_rules! mirrors {
    ($($(#[$meta:meta])* $name:ident = $c:literal, $whole:literal { $($field:ident: $type:ty,)* })*) => {
        $(
            $(#[$meta])*
            #[repr(C)]
            pub struct $name { $(pub $field: $type,)* }
        )*

        pub const MIRRORS: &[Mirror] = &[$(Mirror {
            c: $c,
            size: if $whole { Some(size_of::<$name>()) } else { None },
            fields: &[$((stringify!($field), std::mem::offset_of!($name, $field), size_of::<$type>())),*],
        }),*];
    };
}

macro_rules! numbers {
    ($($name:ident: $type:ty = $value:literal;)*) => {
        $(pub const $name: $type = $value;)*
        pub const NUMBERS: &[(&str, i64)] = &[$((stringify!($name), $value)),*];
    };
}

numbers! {
    JPEG_LIB_VERSION: c_int = 62;
    JPEG_SUSPENDED: c_int = 0;
    JPEG_HEADER_OK: c_int = 1;
    JCS_YCbCr: c_int = 3;
    JCS_CMYK: c_int = 4;
    JCS_EXT_RGBX: c_int = 7;
    JMSG_LENGTH_MAX: usize = 200;
}

/// `JBLOCK`.
pub type Coefficients = [i16; 64];

/// `decode_mcu`: 1 when the MCU is decoded, 0 when more data would be needed.
pub type DecodeMcu = unsafe extern "C-unwind" fn(*mut Decompress, *mut *mut Coefficients) -> c_int;

/// Types by size.
pub const SIZES: &[(&str, usize)] = &[
    ("JBLOCK", size_of::<Coefficients>()),
    ("JCOEF", size_of::<i16>()),
    ("JSAMPLE", size_of::<u8>()),
    ("JDIMENSION", size_of::<c_uint>()),
    ("boolean", size_of::<c_int>()),
];

/// True of the types above where sizes do not tell.
pub const PROMISES: &[&str] = &[
    "(JCOEF)-1 < 0",
    "_Generic(((struct jpeg_entropy_decoder *)0)->decode_mcu, \
     boolean (*)(j_decompress_ptr, JBLOCKROW *): 1, default: 0)",
];

mirrors! {
    ErrorManager = "struct jpeg_error_mgr", true {
        error_exit: Option<unsafe extern "C-unwind" fn(*mut Decompress)>,
        emit_message: Option<unsafe extern "C-unwind" fn(*mut Decompress, c_int)>,
        output_message: Option<unsafe extern "C-unwind" fn(*mut Decompress)>,
        format_message: Option<unsafe extern "C-unwind" fn(*mut Decompress, *mut c_char)>,
        reset_error_mgr: Option<unsafe extern "C-unwind" fn(*mut Decompress)>,
        msg_code: c_int,
        msg_parm: [c_int; 20],
        trace_level: c_int,
        num_warnings: c_long,
        jpeg_message_table: *const *const c_char,
        last_jpeg_message: c_int,
        addon_message_table: *const *const c_char,
        first_addon_message: c_int,
        last_addon_message: c_int,
    }

    SourceManager = "struct jpeg_source_mgr", true {
        next_input_byte: *const u8,
        bytes_in_buffer: usize,
        init_source: Option<unsafe extern "C-unwind" fn(*mut Decompress)>,
        fill_input_buffer: Option<unsafe extern "C-unwind" fn(*mut Decompress) -> c_int>,
        skip_input_data: Option<unsafe extern "C-unwind" fn(*mut Decompress, c_long)>,
        resync_to_restart: Option<unsafe extern "C-unwind" fn(*mut Decompress, c_int) -> c_int>,
        term_source: Option<unsafe extern "C-unwind" fn(*mut Decompress)>,
    }

    /// Private: `jpegint.h`. Its start.
    EntropyDecoder = "struct jpeg_entropy_decoder", false {
        start_pass: *mut c_void,
        decode_mcu: DecodeMcu,
    }

    /// Its start.
    Component = "jpeg_component_info", false {
        component_id: c_int,
        component_index: c_int,
        h_samp_factor: c_int,
        v_samp_factor: c_int,
        quant_tbl_no: c_int,
        dc_tbl_no: c_int,
        ac_tbl_no: c_int,
    }

    /// Its start: how many codes have each length, and their symbols.
    #[derive(Clone, Copy, PartialEq, Eq)]
    Codes = "JHUFF_TBL", false {
        bits: [u8; 17],
        huffval: [u8; 256],
    }

    /// Its start, in rows from top to bottom.
    Quantization = "JQUANT_TBL", false {
        quantval: [u16; 64],
    }

    /// libjpeg compares its size with its own when it is created and refuses with an error if they differ.
    Decompress = "struct jpeg_decompress_struct", true {
        err: *mut ErrorManager,
        mem: *mut c_void,
        progress: *mut c_void,
        client_data: *mut c_void,
        is_decompressor: c_int,
        global_state: c_int,
        src: *mut SourceManager,
        image_width: c_uint,
        image_height: c_uint,
        num_components: c_int,
        jpeg_color_space: c_int,
        out_color_space: c_int,
        scale_num: c_uint,
        scale_denom: c_uint,
        output_gamma: c_double,
        buffered_image: c_int,
        raw_data_out: c_int,
        dct_method: c_int,
        do_fancy_upsampling: c_int,
        do_block_smoothing: c_int,
        quantize_colors: c_int,
        dither_mode: c_int,
        two_pass_quantize: c_int,
        desired_number_of_colors: c_int,
        enable_1pass_quant: c_int,
        enable_external_quant: c_int,
        enable_2pass_quant: c_int,
        output_width: c_uint,
        output_height: c_uint,
        out_color_components: c_int,
        output_components: c_int,
        rec_outbuf_height: c_int,
        actual_number_of_colors: c_int,
        colormap: *mut *mut u8,
        output_scanline: c_uint,
        input_scan_number: c_int,
        input_iMCU_row: c_uint,
        output_scan_number: c_int,
        output_iMCU_row: c_uint,
        coef_bits: *mut c_void,
        quant_tbl_ptrs: [*mut Quantization; 4],
        dc_huff_tbl_ptrs: [*mut Codes; 4],
        ac_huff_tbl_ptrs: [*mut Codes; 4],
        data_precision: c_int,
        comp_info: *mut Component,
        progressive_mode: c_int,
        arith_code: c_int,
        arith_dc_L: [u8; 16],
        arith_dc_U: [u8; 16],
        arith_ac_K: [u8; 16],
        restart_interval: c_uint,
        saw_JFIF_marker: c_int,
        JFIF_major_version: u8,
        JFIF_minor_version: u8,
        density_unit: u8,
        X_density: u16,
        Y_density: u16,
        saw_Adobe_marker: c_int,
        Adobe_transform: u8,
        CCIR601_sampling: c_int,
        marker_list: *mut c_void,
        max_h_samp_factor: c_int,
        max_v_samp_factor: c_int,
        min_DCT_scaled_size: c_int,
        total_iMCU_rows: c_uint,
        sample_range_limit: *mut u8,
        comps_in_scan: c_int,
        cur_comp_info: [*mut Component; 4],
        MCUs_per_row: c_uint,
        MCU_rows_in_scan: c_uint,
        blocks_in_MCU: c_int,
        MCU_membership: [c_int; 10],
        Ss: c_int,
        Se: c_int,
        Ah: c_int,
        Al: c_int,
        unread_marker: c_int,
        master: *mut c_void,
        main: *mut c_void,
        coef: *mut c_void,
        post: *mut c_void,
        inputctl: *mut c_void,
        marker: *mut c_void,
        entropy: *mut EntropyDecoder,
        idct: *mut c_void,
        upsample: *mut c_void,
        cconvert: *mut c_void,
        cquantize: *mut c_void,
    }
}
