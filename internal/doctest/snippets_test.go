// Package doctest keeps the documents true: it compiles their code, and compares what
// they say with what the code says.
package doctest

import (
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// root is the module's directory: a test runs in its package's.
const root = "../.."

// documents are the repository's own pages.
func documents(t *testing.T) (files []string) {
	for _, pattern := range []string{"*.md", "docs/*.md", "conformance/*.md"} {
		found, err := filepath.Glob(filepath.Join(root, pattern))
		require.NoError(t, err)
		files = append(files, found...)
	}
	require.NotEmpty(t, files)
	return files
}

func read(t *testing.T, path ...string) string {
	text, err := os.ReadFile(filepath.Join(append([]string{root}, path...)...))
	require.NoError(t, err)
	return string(text)
}

// block is the code between two fences.
type block struct {
	file string
	line int // of its first line of code
	lang string
	code string
}

func blocks(t *testing.T, file string) (all []block) {
	text, err := os.ReadFile(file)
	require.NoError(t, err)
	var b *block
	for i, line := range strings.Split(string(text), "\n") {
		fence, isFence := strings.CutPrefix(line, "```")
		switch {
		case isFence && b == nil:
			b = &block{file: file, line: i + 2, lang: fence}
		case isFence:
			all = append(all, *b)
			b = nil
		case b != nil:
			b.code += line + "\n"
		}
	}
	require.Nil(t, b, "%s: a code block does not end", file)
	return all
}

// known are the packages that code in documents may use without saying so.
var known = map[string]string{
	"context": "context", "errors": "errors", "fmt": "fmt", "log": "log", "sync": "sync", "time": "time",
	"testing": "testing", "synctest": "testing/synctest",
	"goredis": "github.com/redis/go-redis/v9", "natsgo": "github.com/nats-io/nats.go",
	"clientv3": "go.etcd.io/etcd/client/v3",
	"dchannel": module, "conformance": module + "/conformance",
	"memory": module + "/backend/memory", "redis": module + "/backend/redis",
	"nats": module + "/backend/nats", "etcd": module + "/backend/etcd",
}

const module = "github.com/dchannel/dchannel"

// scene is what code in documents may refer to without declaring it.
const scene = `
var (
	ctx    context.Context
	client *goredis.Client
	b      dchannel.Backend
	ch     *dchannel.Channel
	handle func(any)
)
`

// TestCodeInDocumentsCompiles builds every ```go block, each in a package of its own.
// A block is a file, or declarations, or statements of a function that returns an
// error. Tests in it are run, too.
//
// The packages exist in an overlay only: so they are part of this module, may use its
// dependencies, and need no network.
func TestCodeInDocumentsCompiles(t *testing.T) {
	overlay := struct{ Replace map[string]string }{map[string]string{}}
	var packages, tests []string
	dir := t.TempDir()
	add := func(name, file, code string) {
		on := filepath.Join(dir, name+"_"+file)
		require.NoError(t, os.WriteFile(on, []byte(code), 0o600))
		virtual, err := filepath.Abs(filepath.Join("snippet", name, file))
		require.NoError(t, err)
		overlay.Replace[virtual] = on
	}
	for _, file := range documents(t) {
		for _, b := range blocks(t, file) {
			if b.lang != "go" {
				continue
			}
			name := fmt.Sprintf("p%d", len(packages))
			f, code := complete(t, b)
			if len(declared(f, "Test")) > 0 {
				add(name, "snippet_test.go", code)
				tests = append(tests, name)
			} else {
				add(name, "snippet.go", code)
			}
			add(name, "scene.go", withImports("package p\n", scene))
			packages = append(packages, "./snippet/"+name)
		}
	}
	require.NotEmpty(t, packages, "no Go code in the documents")
	text, err := json.Marshal(overlay)
	require.NoError(t, err)
	list := filepath.Join(dir, "overlay.json")
	require.NoError(t, os.WriteFile(list, text, 0o600))

	run(t, "", "go", append([]string{"build", "-overlay", list}, packages...)...)
	for _, name := range tests {
		program := filepath.Join(dir, name+".test")
		// go vet cannot work in a directory that is not there.
		run(t, "", "go", "test", "-c", "-vet=off", "-overlay", list, "-o", program, "./snippet/"+name)
		// The conformance suite has tests of its own, and reports what a short example of
		// a harness does not cover as failures.
		run(t, dir, program, "-test.timeout=1m", "-test.skip=^TestConformance$")
	}
}

func run(t *testing.T, dir, program string, args ...string) {
	cmd := exec.CommandContext(t.Context(), program, args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
}

// complete makes a file of a block, whose lines the compiler reports as those of the
// document.
func complete(t *testing.T, b block) (*ast.File, string) {
	at, err := filepath.Abs(b.file)
	require.NoError(t, err)
	body := fmt.Sprintf("//line %s:%d\n%s", at, b.line, b.code)
	for _, form := range []string{"%s", "package p\n%s", "package p\nfunc _() error {\n%s\nreturn nil\n}\n"} {
		code := fmt.Sprintf(form, body)
		var f *ast.File
		if f, err = parser.ParseFile(token.NewFileSet(), "", code, parser.SkipObjectResolution); err != nil {
			continue
		}
		if head, rest, ok := strings.Cut(code, "package p\n"); ok && form != "%s" {
			code = withImports(head+"package p\n", rest)
		}
		return f, code
	}
	t.Fatalf("%s:%d: not Go: %v", b.file, b.line, err)
	return nil, ""
}

// withImports adds the known packages that body uses.
func withImports(head, body string) string {
	f, err := parser.ParseFile(token.NewFileSet(), "", head+body, parser.SkipObjectResolution)
	if err != nil {
		return head + body // the compiler will say it better
	}
	used := map[string]bool{}
	ast.Inspect(f, func(n ast.Node) bool {
		if s, ok := n.(*ast.SelectorExpr); ok {
			if x, ok := s.X.(*ast.Ident); ok && known[x.Name] != "" {
				used[x.Name] = true
			}
		}
		return true
	})
	for _, name := range sorted(used) {
		head += "import " + name + " " + strconv.Quote(known[name]) + "\n"
	}
	return head + body
}

// declared returns the names of f's functions that begin with prefix.
func declared(f *ast.File, prefix string) (names []string) {
	for _, d := range f.Decls {
		if d, ok := d.(*ast.FuncDecl); ok && d.Recv == nil && strings.HasPrefix(d.Name.Name, prefix) {
			names = append(names, d.Name.Name)
		}
	}
	return names
}

func sorted(set map[string]bool) (keys []string) {
	for k := range set {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// prose is a document's text without its code, line by line.
func prose(t *testing.T, file string) []string {
	text, err := os.ReadFile(file)
	require.NoError(t, err)
	lines := strings.Split(string(text), "\n")
	inCode := false
	for i, line := range lines {
		fence := strings.HasPrefix(line, "```")
		if inCode != fence || inCode {
			lines[i] = ""
		} else {
			lines[i] = inlineCode.ReplaceAllString(line, "")
		}
		inCode = inCode != fence
	}
	return lines
}

var inlineCode = regexp.MustCompile("`[^`]*`")

// TestLinksLeadSomewhere follows the relative links of the documents.
func TestLinksLeadSomewhere(t *testing.T) {
	for _, file := range documents(t) {
		for i, line := range prose(t, file) {
			for _, part := range strings.Split(line, "](")[1:] {
				target, _, _ := strings.Cut(part, ")")
				if strings.Contains(target, "://") {
					continue
				}
				path, anchor, _ := strings.Cut(target, "#")
				path = filepath.Join(filepath.Dir(file), path)
				if strings.HasPrefix(target, "#") {
					path = file
				}
				info, err := os.Stat(path)
				require.NoError(t, err, "%s:%d", file, i+1)
				if anchor != "" && !info.IsDir() {
					require.Contains(t, anchors(t, path), anchor, "%s:%d", file, i+1)
				}
			}
		}
	}
}

// anchors are the headings of a document, as GitHub makes fragments of them.
func anchors(t *testing.T, file string) (all []string) {
	for _, line := range prose(t, file) {
		if title := strings.TrimLeft(line, "#"); title != line {
			all = append(all, strings.Map(func(r rune) rune {
				switch {
				case r == ' ':
					return '-'
				case r == '-' || r == '_' || r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r > 0x7f:
					return r
				}
				return -1
			}, strings.ToLower(strings.TrimSpace(title))))
		}
	}
	return all
}
