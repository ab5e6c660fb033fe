"""Real facts about the fifty states of the USA: the two-hop family's ground truth.

`STATES` lists one state a line: name, abbreviation, capital, year of admission, Census Bureau region, nickname,
official bird, official tree. `CITIES` lists cities and towns of each state that are not its capital. A name that is
well known in more than one state (Springfield, Portland, Arlington ...), or that holds the name of a state, is left
out, so that every name in the list has one answer.
"""

from typing import NamedTuple


class State(NamedTuple):
    name: str
    abbreviation: str
    capital: str
    year: str
    region: str
    nickname: str
    bird: str
    tree: str


STATES = [
    State(*(field.strip() for field in line.split("|")))
    for line in """\
Alabama|AL|Montgomery|1819|South|Yellowhammer State|northern flicker|longleaf pine
Alaska|AK|Juneau|1959|West|Last Frontier|willow ptarmigan|Sitka spruce
Arizona|AZ|Phoenix|1912|West|Grand Canyon State|cactus wren|palo verde
Arkansas|AR|Little Rock|1836|South|Natural State|mockingbird|loblolly pine
California|CA|Sacramento|1850|West|Golden State|valley quail|redwood
Colorado|CO|Denver|1876|West|Centennial State|lark bunting|blue spruce
Connecticut|CT|Hartford|1788|Northeast|Constitution State|robin|white oak
Delaware|DE|Dover|1787|South|First State|blue hen|holly
Florida|FL|Tallahassee|1845|South|Sunshine State|mockingbird|sabal palm
Georgia|GA|Atlanta|1788|South|Peach State|brown thrasher|live oak
Hawaii|HI|Honolulu|1959|West|Aloha State|nene|kukui
Idaho|ID|Boise|1890|West|Gem State|mountain bluebird|western white pine
Illinois|IL|Springfield|1818|Midwest|Prairie State|cardinal|white oak
Indiana|IN|Indianapolis|1816|Midwest|Hoosier State|cardinal|tulip tree
Iowa|IA|Des Moines|1846|Midwest|Hawkeye State|goldfinch|oak
Kansas|KS|Topeka|1861|Midwest|Sunflower State|western meadowlark|cottonwood
Kentucky|KY|Frankfort|1792|South|Bluegrass State|cardinal|tulip tree
Louisiana|LA|Baton Rouge|1812|South|Pelican State|brown pelican|bald cypress
Maine|ME|Augusta|1820|Northeast|Pine Tree State|chickadee|eastern white pine
Maryland|MD|Annapolis|1788|South|Old Line State|oriole|white oak
Massachusetts|MA|Boston|1788|Northeast|Bay State|chickadee|elm
Michigan|MI|Lansing|1837|Midwest|Great Lakes State|robin|eastern white pine
Minnesota|MN|Saint Paul|1858|Midwest|North Star State|loon|red pine
Mississippi|MS|Jackson|1817|South|Magnolia State|mockingbird|magnolia
Missouri|MO|Jefferson City|1821|Midwest|Show Me State|eastern bluebird|dogwood
Montana|MT|Helena|1889|West|Treasure State|western meadowlark|ponderosa pine
Nebraska|NE|Lincoln|1867|Midwest|Cornhusker State|western meadowlark|cottonwood
Nevada|NV|Carson City|1864|West|Silver State|mountain bluebird|bristlecone pine
New Hampshire|NH|Concord|1788|Northeast|Granite State|purple finch|white birch
New Jersey|NJ|Trenton|1787|Northeast|Garden State|goldfinch|red oak
New Mexico|NM|Santa Fe|1912|West|Land of Enchantment|roadrunner|pinyon pine
New York|NY|Albany|1788|Northeast|Empire State|eastern bluebird|sugar maple
North Carolina|NC|Raleigh|1789|South|Tar Heel State|cardinal|pine
North Dakota|ND|Bismarck|1889|Midwest|Peace Garden State|western meadowlark|elm
Ohio|OH|Columbus|1803|Midwest|Buckeye State|cardinal|buckeye
Oklahoma|OK|Oklahoma City|1907|South|Sooner State|flycatcher|redbud
Oregon|OR|Salem|1859|West|Beaver State|western meadowlark|Douglas fir
Pennsylvania|PA|Harrisburg|1787|Northeast|Keystone State|ruffed grouse|eastern hemlock
Rhode Island|RI|Providence|1790|Northeast|Ocean State|Rhode Island Red|red maple
South Carolina|SC|Columbia|1788|South|Palmetto State|Carolina wren|sabal palm
South Dakota|SD|Pierre|1889|Midwest|Mount Rushmore State|pheasant|white spruce
Tennessee|TN|Nashville|1796|South|Volunteer State|mockingbird|tulip tree
Texas|TX|Austin|1845|South|Lone Star State|mockingbird|pecan
Utah|UT|Salt Lake City|1896|West|Beehive State|gull|quaking aspen
Vermont|VT|Montpelier|1791|Northeast|Green Mountain State|hermit thrush|sugar maple
Virginia|VA|Richmond|1788|South|Old Dominion|cardinal|dogwood
Washington|WA|Olympia|1889|West|Evergreen State|goldfinch|western hemlock
West Virginia|WV|Charleston|1863|South|Mountain State|cardinal|sugar maple
Wisconsin|WI|Madison|1848|Midwest|Badger State|robin|sugar maple
Wyoming|WY|Cheyenne|1890|West|Equality State|western meadowlark|cottonwood
""".splitlines()
]

RELATIONS = ("capital", "abbreviation", "nickname", "bird", "tree", "region", "year")

CITIES: dict[str, list[str]] = {
    state: list(names.split(", "))
    for state, names in (
        line.split(": ")
        for line in """\
Alabama: Birmingham, Mobile, Tuscaloosa, Hoover, Dothan, Gadsden, Prattville, Opelika, Anniston, Talladega, Fairhope, Bessemer, Alabaster, Cullman, Daphne, Tuskegee, Scottsboro, Sylacauga
Alaska: Anchorage, Fairbanks, Sitka, Ketchikan, Wasilla, Kodiak, Nome, Valdez, Kenai, Soldotna, Unalaska, Wrangell, Kotzebue, Skagway, Dillingham, Talkeetna, Yakutat
Arizona: Tucson, Mesa, Scottsdale, Tempe, Yuma, Flagstaff, Goodyear, Prescott, Sedona, Kingman, Nogales, Tombstone, Bisbee, Marana, Maricopa, Winslow, Safford, Gilbert, Chandler
Arkansas: Fort Smith, Springdale, Jonesboro, Rogers, Bentonville, Pine Bluff, Hot Springs, Searcy, Paragould, Cabot, Blytheville, Siloam Springs, Arkadelphia, Maumelle, Forrest City, Eureka Springs, Stuttgart
California: Los Angeles, San Diego, San Jose, San Francisco, Fresno, Oakland, Bakersfield, Anaheim, Stockton, Irvine, Modesto, Fontana, Oxnard, Berkeley, Palo Alto, Malibu, Burbank, Visalia, Torrance, Escondido
Colorado: Fort Collins, Thornton, Arvada, Pueblo, Greeley, Boulder, Longmont, Broomfield, Castle Rock, Grand Junction, Durango, Aspen, Vail, Telluride, Breckenridge, Leadville, Gunnison, Alamosa, Steamboat Springs
Connecticut: Bridgeport, New Haven, Stamford, Waterbury, Danbury, New Britain, Meriden, Norwich, Naugatuck, Groton, Mystic, Greenwich, Darien, Willimantic, Wallingford, Glastonbury, Simsbury, Southington
Delaware: Seaford, Elsmere, Rehoboth Beach, Lewes, Harrington, Millsboro, Bethany Beach, Dewey Beach, Dagsboro, Selbyville, Bridgeville, Claymont, Hockessin, Bear, Fenwick Island, Ocean View, Felton, Frederica
Florida: Miami, Tampa, Orlando, Hialeah, Fort Lauderdale, Cape Coral, Pensacola, Sarasota, Clearwater, Daytona Beach, Key West, Boca Raton, Ocala, Kissimmee, Pompano Beach, Lakeland, Fort Myers, Delray Beach, Saint Petersburg
Georgia: Macon, Savannah, Warner Robins, Valdosta, Alpharetta, Dalton, Kennesaw, Statesboro, Waycross, Tifton, Dunwoody, Vidalia, Cordele, Moultrie, Americus, Milledgeville, Douglasville, Lawrenceville
Hawaii: Hilo, Kailua, Waipahu, Pearl City, Kaneohe, Mililani, Kahului, Kihei, Lahaina, Wailuku, Kapaa, Lihue, Makakilo, Wahiawa, Waimea, Ewa Beach, Kapolei, Haleiwa, Waianae
Idaho: Nampa, Pocatello, Twin Falls, Post Falls, Rexburg, Moscow, Kuna, Ketchum, Sandpoint, Blackfoot, Hailey, Burley, Rathdrum, Payette, Chubbuck, Weiser, Orofino, Driggs
Illinois: Chicago, Joliet, Naperville, Rockford, Elgin, Waukegan, Champaign, Schaumburg, Bolingbrook, Palatine, Skokie, Moline, Kankakee, Carbondale, Galesburg, Effingham, Edwardsville
Indiana: Fort Wayne, Evansville, South Bend, Fishers, Gary, Muncie, Terre Haute, Kokomo, Elkhart, Mishawaka, Valparaiso, Vincennes, Merrillville, Jeffersonville, Zionsville, Crawfordsville, Logansport, Noblesville
Iowa: Cedar Rapids, Davenport, Sioux City, Waterloo, Ames, Dubuque, Ankeny, Council Bluffs, Urbandale, Cedar Falls, Bettendorf, Mason City, Marshalltown, Ottumwa, Fort Dodge, Muscatine, Coralville, Keokuk, Grinnell
Kansas: Wichita, Overland Park, Olathe, Lenexa, Salina, Leavenworth, Leawood, Dodge City, Emporia, Junction City, Hays, Great Bend, Atchison, Coffeyville, Chanute, Goodland, Liberal, Parsons
Kentucky: Louisville, Owensboro, Hopkinsville, Nicholasville, Elizabethtown, Jeffersontown, Paducah, Radcliff, Erlanger, Shively, Berea, Bardstown, Middlesboro, Corbin, Pikeville, Maysville, Harrodsburg
Louisiana: New Orleans, Shreveport, Lake Charles, Bossier City, Houma, Kenner, Metairie, Slidell, Ruston, Natchitoches, Opelousas, Thibodaux, Bogalusa, Marrero, Chalmette, Mandeville, Zachary, Donaldsonville
Maine: Bangor, Biddeford, Saco, Westbrook, Presque Isle, Caribou, Ellsworth, Calais, Hallowell, Kittery, Ogunquit, Kennebunk, Bar Harbor, Millinocket, Houlton, Skowhegan, Orono, Madawaska
Maryland: Baltimore, Frederick, Rockville, Gaithersburg, Bowie, Hagerstown, College Park, Silver Spring, Bethesda, Towson, Ellicott City, Dundalk, Greenbelt, Catonsville, Pikesville, Glen Burnie, Hyattsville
Massachusetts: Worcester, Lowell, Brockton, New Bedford, Fall River, Framingham, Haverhill, Waltham, Malden, Taunton, Chicopee, Peabody, Methuen, Pittsfield, Leominster, Holyoke, Gloucester, Nantucket, Provincetown
Michigan: Detroit, Grand Rapids, Sterling Heights, Ann Arbor, Flint, Dearborn, Livonia, Kalamazoo, Saginaw, Muskegon, Battle Creek, Pontiac, Novi, Traverse City, Ypsilanti, Escanaba, Petoskey, Alpena
Minnesota: Minneapolis, Brooklyn Park, Eagan, Eden Prairie, Maple Grove, Coon Rapids, Burnsville, Minnetonka, Edina, Mankato, Moorhead, Winona, Brainerd, Hibbing, Owatonna, Faribault, Shakopee
Mississippi: Gulfport, Southaven, Biloxi, Hattiesburg, Olive Branch, Tupelo, Horn Lake, Pascagoula, Starkville, Vicksburg, Natchez, Ocean Springs, Picayune, Clarksdale, Yazoo City, Gautier, Grenada, Kosciusko, Moss Point
Missouri: Saint Louis, Saint Joseph, Blue Springs, Joplin, Cape Girardeau, Ballwin, Wentzville, Sedalia, Rolla, Hannibal, Poplar Bluff, Kirksville, Warrensburg, Branson, Nixa, Sikeston, Moberly, Florissant
Montana: Billings, Missoula, Great Falls, Bozeman, Butte, Kalispell, Havre, Anaconda, Miles City, Whitefish, Lewistown, Glendive, Polson, Deer Lodge, Wolf Point, Cut Bank, Libby, Hardin
Nebraska: Omaha, Grand Island, Kearney, North Platte, Papillion, La Vista, Scottsbluff, Beatrice, Gering, Ogallala, Chadron, Valentine, Broken Bow, Ralston, Plattsmouth, Holdrege, Wahoo
Nevada: Las Vegas, Reno, Sparks, Elko, Boulder City, Fernley, Fallon, Winnemucca, Pahrump, Laughlin, Tonopah, Gardnerville, Incline Village, Lovelock, Yerington, Caliente, West Wendover, Searchlight, Carlin
New Hampshire: Nashua, Keene, Laconia, Somersworth, Derry, Merrimack, Londonderry, Hooksett, Goffstown, Wolfeboro, Peterborough, Jaffrey, Newmarket, Gilford, Moultonborough, Swanzey, Meredith, Epping
New Jersey: Paterson, Toms River, Hoboken, Bayonne, Passaic, Hackensack, Atlantic City, Cherry Hill, Asbury Park, New Brunswick, Perth Amboy, Secaucus, Parsippany, Piscataway, Weehawken, Teaneck, Paramus, Vineland
New Mexico: Albuquerque, Las Cruces, Rio Rancho, Hobbs, Alamogordo, Gallup, Deming, Los Lunas, Portales, Lovington, Los Alamos, Silver City, Ruidoso, Taos, Socorro, Bernalillo, Raton, Tucumcari, Belen
New York: Buffalo, Yonkers, Syracuse, Utica, New Rochelle, Schenectady, White Plains, Niagara Falls, Binghamton, Ithaca, Poughkeepsie, Elmira, Lackawanna, Plattsburgh, Oneonta, Cooperstown, Tonawanda, Peekskill
North Carolina: Charlotte, Greensboro, Durham, Cary, High Point, Asheville, Gastonia, Chapel Hill, Rocky Mount, Hickory, Kannapolis, Goldsboro, New Bern, Kinston, Huntersville, Statesville, Lumberton, Kernersville
North Dakota: Fargo, Grand Forks, Minot, Williston, Mandan, Wahpeton, Devils Lake, Valley City, Watford City, Beulah, Casselton, Bottineau, Carrington, Langdon, Medora, Hettinger, Ellendale, Hazen
Ohio: Cincinnati, Cleveland, Toledo, Akron, Dayton, Parma, Youngstown, Lorain, Kettering, Elyria, Strongsville, Findlay, Sandusky, Zanesville, Massillon, Steubenville, Ashtabula, Wooster
Oklahoma: Tulsa, Norman, Broken Arrow, Edmond, Lawton, Enid, Muskogee, Bartlesville, Owasso, Ponca City, Yukon, Sapulpa, Durant, Tahlequah, Chickasha, Claremore, Guymon, Okmulgee
Oregon: Eugene, Gresham, Hillsboro, Beaverton, Bend, Corvallis, Tigard, Grants Pass, Klamath Falls, Roseburg, Astoria, Coos Bay, Pendleton, Lake Oswego, Keizer, Hood River, La Grande, Tillamook, Hermiston
Pennsylvania: Philadelphia, Pittsburgh, Allentown, Erie, Scranton, Bethlehem, Altoona, Bloomsburg, Hershey, Gettysburg, Williamsport, Hazleton, Norristown, Pottsville, Stroudsburg, Punxsutawney, Latrobe, Aliquippa
Rhode Island: Cranston, Warwick, Pawtucket, Woonsocket, South Kingstown, North Kingstown, Westerly, Central Falls, Burrillville, Narragansett, Tiverton, East Greenwich, Charlestown, New Shoreham, Pascoag, Coventry
South Carolina: Rock Hill, Summerville, Goose Creek, Sumter, Spartanburg, Myrtle Beach, Hilton Head, Aiken, Greer, Mauldin, Orangeburg, Easley, Simpsonville, Bluffton, Hanahan, Gaffney, Clemson, Walterboro
South Dakota: Sioux Falls, Rapid City, Brookings, Mitchell, Yankton, Vermillion, Spearfish, Box Elder, Beresford, Belle Fourche, Dell Rapids, Mobridge, Deadwood, Milbank, Chamberlain, Sisseton, Flandreau, Huron
Tennessee: Memphis, Knoxville, Chattanooga, Clarksville, Murfreesboro, Johnson City, Kingsport, Collierville, Gallatin, Cookeville, Oak Ridge, Gatlinburg, Sevierville, Pigeon Forge, Tullahoma, Dyersburg, Goodlettsville
Texas: Dallas, Houston, San Antonio, Fort Worth, El Paso, Corpus Christi, Plano, Lubbock, Laredo, Irving, Amarillo, Grand Prairie, Brownsville, Killeen, Waco, Denton, Galveston, Wichita Falls, San Angelo
Utah: West Valley City, Provo, West Jordan, Orem, Ogden, Layton, Lehi, Taylorsville, Draper, Bountiful, Spanish Fork, Pleasant Grove, Tooele, Cedar City, Moab, Kaysville, Vernal, Kanab, Nephi
Vermont: South Burlington, Rutland, Barre, Winooski, Vergennes, Brattleboro, Bennington, Stowe, Middlebury, Saint Johnsbury, Shelburne, Swanton, Morrisville, Killington, Bellows Falls, Lyndonville, Poultney, Hinesburg
Virginia: Chesapeake, Norfolk, Newport News, Reston, Roanoke, Suffolk, Lynchburg, Harrisonburg, Charlottesville, Manassas, Herndon, Staunton, Blacksburg, Williamsburg, Culpeper, Christiansburg, Radford, Wytheville
Washington: Seattle, Spokane, Tacoma, Renton, Yakima, Bellingham, Kennewick, Pasco, Walla Walla, Wenatchee, Puyallup, Bremerton, Kirkland, Issaquah, Port Angeles, Ellensburg, Pullman, Moses Lake
West Virginia: Morgantown, Parkersburg, Weirton, Martinsburg, Fairmont, Beckley, Elkins, Buckhannon, Nitro, Moundsville, Shepherdstown, Harpers Ferry, Keyser, Philippi, Follansbee, New Martinsville, Charles Town
Wisconsin: Milwaukee, Green Bay, Kenosha, Racine, Appleton, Waukesha, Eau Claire, Oshkosh, Janesville, La Crosse, Sheboygan, Wauwatosa, Wausau, Beloit, Stevens Point, Manitowoc, Neenah, Baraboo
Wyoming: Casper, Laramie, Gillette, Rock Springs, Sheridan, Green River, Cody, Rawlins, Lander, Torrington, Worland, Thermopolis, Kemmerer, Glenrock, Greybull, Lusk, Pinedale, Sundance, Ten Sleep
""".splitlines()  # noqa: E501
    )
}
