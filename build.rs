//! Lets the C compiler compare `src/image/decode/jpeg/layout.rs` with the headers of the libjpeg-turbo that is linked.
//!
//! `cfg(cnnrs_libjpeg_layout)` says that they agree, without which libjpeg decodes on its own: where the headers are not
//! to be found (a library from elsewhere), or for a target whose types differ from this machine's.

use std::error::Error;

#[cfg(feature = "native")]
#[path = "src/image/decode/jpeg/layout.rs"]
mod layout;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-check-cfg=cfg(cnnrs_libjpeg_layout)");
    #[cfg(feature = "native")]
    if libjpeg::agrees()? {
        println!("cargo::rustc-cfg=cnnrs_libjpeg_layout");
    }
    Ok(())
}

#[cfg(feature = "native")]
mod libjpeg {
    use std::error::Error;
    use std::ffi::c_long;
    use std::fmt::Write;
    use std::path::{Path, PathBuf};
    use std::{env, fs};

    use crate::layout::{MIRRORS, NUMBERS, PROMISES, SIZES};

    const LAYOUT: &str = "src/image/decode/jpeg/layout.rs";
    const INCLUDES: &str = "#include <stddef.h>\n#include <stdio.h>\n#define JPEG_INTERNALS\n#include <jpeglib.h>\n";

    /// False where there is nothing to compare with.
    ///
    /// # Errors
    /// When the library has another layout: the code that uses it must be adapted first.
    pub fn agrees() -> Result<bool, Box<dyn Error>> {
        println!("cargo::rerun-if-changed={LAYOUT}");
        let unknown = |why: &str| {
            println!("cargo::warning=JPEGs are decoded by libjpeg-turbo alone, which is slower: {why}");
            Ok(false)
        };
        if !has_types_of_this_machine()? {
            return unknown("the layout of its structures cannot be computed here for this target");
        }
        let Some(headers) = headers() else {
            return unknown("its private headers were not found (they are where turbojpeg-sys builds it)");
        };
        let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
        let compiled = |name: &str, text: String| {
            let source = out.join(name);
            fs::write(&source, text)?;
            let compiled = cc::Build::new().includes(&headers).file(&source).std("c11").try_compile_intermediates();
            Ok::<_, std::io::Error>(compiled)
        };
        let question = format!("{INCLUDES}_Static_assert(_Generic(0, int: 1), \"C11\");\n");
        if compiled("libjpeg_headers.c", question)?.is_err() {
            return unknown("this C compiler does not read them, or no C11");
        }
        match compiled("libjpeg_layout.c", assertions())? {
            Ok(_) => Ok(true),
            Err(error) => {
                Err(format!("libjpeg-turbo is not as {LAYOUT} describes it, adapt that and what reads it: {error}")
                    .into())
            }
        }
    }

    /// The numbers in `layout` are those of the machine that builds.
    fn has_types_of_this_machine() -> Result<bool, Box<dyn Error>> {
        let width: u32 = env::var("CARGO_CFG_TARGET_POINTER_WIDTH")?.parse()?;
        let long = if env::var("CARGO_CFG_TARGET_OS")? == "windows" { 32 } else { width };
        Ok((width, long) == (usize::BITS, c_long::BITS))
    }

    /// The folders of the public headers and of the private ones, which only the sources have that were built.
    fn headers() -> Option<[PathBuf; 2]> {
        let public = PathBuf::from(env::var_os("DEP_TURBOJPEG_INCLUDE")?);
        let cache = fs::read_to_string(public.parent()?.join("build").join("CMakeCache.txt")).ok()?;
        let home = cache.lines().find_map(|line| line.strip_prefix("CMAKE_HOME_DIRECTORY:INTERNAL="))?;
        let private = Path::new(home).join("src");
        private.join("jpegint.h").is_file().then_some([public, private])
    }

    fn assertions() -> String {
        let mut text = INCLUDES.to_owned();
        let mut assert = |claim: &str| {
            let _ = writeln!(text, "_Static_assert({claim}, \"{LAYOUT}\");");
        };
        for mirror in MIRRORS {
            let c = mirror.c;
            for (field, offset, size) in mirror.fields {
                assert(&format!("offsetof({c}, {field}) == {offset}"));
                assert(&format!("sizeof((({c} *)0)->{field}) == {size}"));
            }
            if let Some(size) = mirror.size {
                assert(&format!("sizeof({c}) == {size}"));
            }
        }
        NUMBERS.iter().for_each(|(name, value)| assert(&format!("{name} == {value}")));
        SIZES.iter().for_each(|(name, size)| assert(&format!("sizeof({name}) == {size}")));
        PROMISES.iter().for_each(|promise| assert(promise));
        text
    }
}
