package doctest

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// guarantee is one of package conformance's, whose list is its own.
type guarantee struct {
	name, rule string
	cases      []string
}

// guarantees reads the suite's list from its source, in the order of its function
// guarantees.
func guarantees(t *testing.T) (all []guarantee) {
	files, err := filepath.Glob(filepath.Join(root, "conformance", "*.go"))
	require.NoError(t, err)
	groups := map[string][]guarantee{}
	var order []string
	for _, file := range files {
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
		require.NoError(t, err)
		ast.Inspect(f, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.FuncDecl:
				if n.Name.Name == "guarantees" && n.Recv == nil {
					order = groupsIn(n)
				}
			case *ast.ValueSpec:
				if lit, ok := sliceOf(n.Values, "guarantee"); ok {
					for _, e := range lit.Elts {
						groups[n.Names[0].Name] = append(groups[n.Names[0].Name], guaranteeOf(t, e.(*ast.CompositeLit)))
					}
				}
			}
			return true
		})
	}
	require.NotEmpty(t, order, "conformance has no function guarantees with a list of its groups")
	require.Len(t, groups, len(order), "groups of guarantees that are in the list, and that are not")
	for _, name := range order {
		all = append(all, groups[name]...)
	}
	return all
}

// groupsIn returns the names in the [][]guarantee literal of a function.
func groupsIn(f *ast.FuncDecl) (names []string) {
	ast.Inspect(f, func(n ast.Node) bool {
		lit, ok := n.(*ast.CompositeLit)
		if !ok {
			return true
		}
		for _, e := range lit.Elts {
			if id, ok := e.(*ast.Ident); ok {
				names = append(names, id.Name)
			}
		}
		return false
	})
	return names
}

func sliceOf(values []ast.Expr, element string) (*ast.CompositeLit, bool) {
	if len(values) != 1 {
		return nil, false
	}
	lit, ok := values[0].(*ast.CompositeLit)
	if !ok {
		return nil, false
	}
	array, ok := lit.Type.(*ast.ArrayType)
	if !ok {
		return nil, false
	}
	id, ok := array.Elt.(*ast.Ident)
	return lit, ok && id.Name == element
}

func guaranteeOf(t *testing.T, lit *ast.CompositeLit) (g guarantee) {
	for _, e := range lit.Elts {
		field, ok := e.(*ast.KeyValueExpr)
		require.True(t, ok)
		switch field.Key.(*ast.Ident).Name {
		case "name":
			g.name = text(t, field.Value)
		case "rule":
			g.rule = text(t, field.Value)
		case "cases":
			for _, c := range field.Value.(*ast.CompositeLit).Elts {
				g.cases = append(g.cases, text(t, c.(*ast.CompositeLit).Elts[0]))
			}
		}
	}
	require.NotEmpty(t, g.name)
	return g
}

// text is the value of a string constant, which may be a sum.
func text(t *testing.T, e ast.Expr) string {
	switch e := e.(type) {
	case *ast.BasicLit:
		s, err := strconv.Unquote(e.Value)
		require.NoError(t, err)
		return s
	case *ast.BinaryExpr:
		return text(t, e.X) + text(t, e.Y)
	}
	t.Fatalf("not a constant string: %T", e)
	return ""
}

// TestGuaranteesAreThoseOfTheSuite compares docs/guarantees.md with package conformance:
// the same names in the same order, each with the suite's rule, in the suite's words, and
// with its cases.
func TestGuaranteesAreThoseOfTheSuite(t *testing.T) {
	page := read(t, "docs", "guarantees.md")
	sections := regexp.MustCompile(`(?m)^### (\w+)\n`).FindAllStringSubmatchIndex(page, -1)
	var documented, want []string
	bodies := map[string]string{}
	for i, s := range sections {
		end := len(page)
		if i+1 < len(sections) {
			end = sections[i+1][0]
		}
		name := page[s[2]:s[3]]
		documented = append(documented, name)
		bodies[name] = page[s[1]:end]
	}
	all := guarantees(t)
	for _, g := range all {
		want = append(want, g.name)
	}
	require.Equal(t, want, documented, "the guarantees of package conformance, and the headings of docs/guarantees.md")
	for _, g := range all {
		var rule []string
		for _, line := range strings.Split(bodies[g.name], "\n") {
			if quoted, ok := strings.CutPrefix(line, "> "); ok {
				rule = append(rule, quoted)
			}
		}
		require.Equal(t, strings.ToUpper(g.rule[:1])+g.rule[1:]+".", strings.Join(rule, " "),
			"%s: the rule in package conformance, and the quotation in docs/guarantees.md", g.name)
		cases := "Cases: `" + strings.Join(g.cases, "`, `") + "`."
		require.Contains(t, strings.Join(strings.Fields(bodies[g.name]), " "), cases, g.name)
		require.Contains(t, bodies[g.name], "Not promised:", g.name)
	}
}
