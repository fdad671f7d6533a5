package doctest

import (
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/etcd"
	"github.com/dchannel/dchannel/backend/memory"
	"github.com/dchannel/dchannel/backend/nats"
	"github.com/dchannel/dchannel/backend/redis"
)

// drivers are the backends of this repository, with what the README says about them in
// numbers.
var drivers = map[string]struct {
	client   string // its module
	maxFrame func() int
}{
	"memory": {client: "none"},
	"redis": {"github.com/redis/go-redis/v9", func() int {
		client := goredis.NewClient(&goredis.Options{})
		defer client.Close()
		return redis.New(client).MaxFrame()
	}},
	"nats": {"github.com/nats-io/nats.go", func() int { return nats.New(nil).MaxFrame() }},
	"etcd": {"go.etcd.io/etcd/client/v3", func() int { return etcd.New(nil).MaxFrame() }},
}

// table returns the rows of the document's table with that first heading, by heading.
func table(t *testing.T, text, first string) (rows []map[string]string) {
	cells := func(line string) (cs []string) {
		for _, c := range strings.Split(strings.Trim(line, "|"), "|") {
			cs = append(cs, strings.TrimSpace(c))
		}
		return cs
	}
	var heads []string
	for _, line := range strings.Split(text, "\n") {
		switch {
		case !strings.HasPrefix(line, "|"):
			heads = nil
		case heads == nil && strings.HasPrefix(line, "| "+first+" |"):
			heads = cells(line)
		case heads != nil && !strings.HasPrefix(line, "|-"):
			row := map[string]string{}
			for i, c := range cells(line) {
				require.Less(t, i, len(heads), "too many cells: %s", line)
				row[heads[i]] = c
			}
			require.Len(t, row, len(heads), "too few cells: %s", line)
			rows = append(rows, row)
		}
	}
	require.NotEmpty(t, rows, "no table of %s", first)
	return rows
}

func folders(t *testing.T, path string) (names []string) {
	found, err := os.ReadDir(filepath.Join(root, path))
	require.NoError(t, err)
	for _, f := range found {
		if f.IsDir() {
			names = append(names, f.Name())
		}
	}
	return names
}

func TestEveryBackendHasATrueRow(t *testing.T) {
	goMod := read(t, "go.mod")
	var named []string
	for _, row := range table(t, read(t, "README.md"), "backend") {
		name := row["backend"]
		named = append(named, name)
		d, ok := drivers[name]
		require.True(t, ok, "the README has a backend that this test does not know: %s", name)
		require.Equal(t, "[backend/"+name+"](backend/"+name+")", row["package"])
		require.Contains(t, row["client"], d.client)
		if d.maxFrame == nil {
			require.Equal(t, "no limit", row["largest frame"], name)
			continue
		}
		require.Contains(t, goMod, "\t"+d.client+" v", name)
		require.Contains(t, row["largest frame"], commas(d.maxFrame())+" bytes", name)
	}
	slices.Sort(named)
	require.Equal(t, folders(t, "backend"), named, "the README's table and the folders of backend/")
}

// The optional interfaces say whether a limit and a position check are mentioned rightly.
func TestOptionalInterfacesAreAsDescribed(t *testing.T) {
	for name, b := range map[string]dchannel.Backend{
		"memory": (*memory.Backend)(nil), "redis": (*redis.Backend)(nil), "nats": (*nats.Backend)(nil), "etcd": (*etcd.Backend)(nil),
	} {
		_, limits := b.(dchannel.FrameLimiter)
		require.Equal(t, drivers[name].maxFrame != nil, limits, name)
		_, checks := b.(dchannel.Checker)
		require.Equal(t, name == "nats", checks, "%s: the README says that NATS compares positions, and nobody else", name)
	}
}

// TestNumbersAreTheDefaults finds the README's numbers in the code.
func TestNumbersAreTheDefaults(t *testing.T) {
	text := strings.Join(strings.Fields(read(t, "README.md")), " ")
	for _, claim := range []struct {
		words string
		holds bool
	}{
		{"at least the last " + commas(memory.DefaultRetentionMessages) + " messages that are not older than 10 minutes",
			memory.DefaultRetention == 10*time.Minute &&
				redis.DefaultRetentionMessages == memory.DefaultRetentionMessages && redis.DefaultRetention == memory.DefaultRetention &&
				etcd.DefaultRetentionMessages == memory.DefaultRetentionMessages && etcd.DefaultRetention == memory.DefaultRetention &&
				strings.Contains(read(t, "backend", "nats", "options.go"), "by default "+commas(memory.DefaultRetentionMessages)+", as long")},
		{"at most " + commas(dchannel.DefaultMaxMessage) + " bytes on every backend", true},
		{"for 24 hours by default", dchannel.DefaultCloseKeep == 24*time.Hour},
		{"probe the server every 5 seconds, Redis when nothing has come for 5 seconds",
			redis.DefaultProbeInterval == 5*time.Second && etcd.DefaultProbeInterval == 5*time.Second &&
				nats.New(nil).CheckEvery() == 5*time.Second},
	} {
		require.Contains(t, text, claim.words)
		require.True(t, claim.holds, "not the code's defaults any more: %s", claim.words)
	}
}

// TestCommandsExist looks for the targets of make that documents name.
func TestCommandsExist(t *testing.T) {
	makefile := read(t, "Makefile")
	for _, file := range documents(t) {
		text, err := os.ReadFile(file)
		require.NoError(t, err)
		for _, m := range regexp.MustCompile("(?m)(?:^|`)make\\s+([a-z-]+)").FindAllSubmatch(text, -1) {
			require.Contains(t, makefile, "\n"+string(m[1])+":", "%s names make %s", file, m[1])
		}
	}
}

// TestFoldersExist checks the map of folders against what is there.
func TestFoldersExist(t *testing.T) {
	named := map[string]bool{}
	for _, row := range table(t, read(t, "README.md"), "folder") {
		named[strings.Trim(strings.Split(row["folder"], "]")[0], "[`")] = true
	}
	for _, name := range folders(t, ".") {
		if !strings.HasPrefix(name, ".") && !ignored[name] {
			require.True(t, named[name], "the README's map has no %s", name)
		}
	}
}

// TestContributingIsShort: who has to read more than this begins to guess.
func TestContributingIsShort(t *testing.T) {
	_, section, found := strings.Cut(read(t, "CONTRIBUTING.md"), "\n## Write a backend\n")
	require.True(t, found)
	section, _, _ = strings.Cut(section, "\n## ")
	require.LessOrEqual(t, strings.Count(strings.TrimSpace(section), "\n")+1, 60, "lines of Write a backend")
	for _, name := range folders(t, "backend") {
		doc := packageDoc(t, filepath.Join("backend", name))
		for _, heading := range []string{"Delivery", "Close marker", "Locks", "Reconnect", "Limits", "Cluster", "Server versions"} {
			require.Contains(t, doc, "\n# "+heading+"\n", "the documentation of package %s", name)
		}
	}
}

func packageDoc(t *testing.T, dir string) (doc string) {
	files, err := filepath.Glob(filepath.Join(root, dir, "*.go"))
	require.NoError(t, err)
	for _, file := range files {
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ParseComments|parser.PackageClauseOnly)
		require.NoError(t, err)
		doc += f.Doc.Text()
	}
	return doc
}

// ignored are results of test runs.
var ignored = map[string]bool{"chaos-out": true, "testdata": true}

// commas writes n as people read it.
func commas(n int) string {
	s := strconv.Itoa(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}
