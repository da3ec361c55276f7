# Writes OUT, a C++ file that holds the text of each of FILES under its name.
set(text "#include \"sources.h\"\n\nnamespace fcm {\n\nconst std::vector<Source>& sources() {\n  static const std::vector<Source> all = {\n")
foreach(file IN LISTS FILES)
  get_filename_component(name ${file} NAME)
  file(READ ${file} content)
  string(APPEND text "      {\"${name}\", R\"fcm_source(${content})fcm_source\"},\n")
endforeach()
string(APPEND text "  };\n  return all;\n}\n\n}  // namespace fcm\n")
file(WRITE ${OUT} "${text}")
